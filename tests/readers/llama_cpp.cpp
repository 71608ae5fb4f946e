// Asks llama.cpp, as a library, about a model file; tests/readers/llama_cpp.py builds it and compares the answers.
//   llama_cpp MODEL tokenize           texts on stdin, each ended by a zero byte -> a line of ids for each
//   llama_cpp MODEL logits             lines of ids -> float32 logits of every position
//   llama_cpp MODEL greedy N           lines of ids -> a line of the N most likely next ids for each
#include "llama.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

using Ids = std::vector<llama_token>;

static void fail(const std::string & why) {
    fprintf(stderr, "%s\n", why.c_str());
    exit(1);
}

static void print(const Ids & ids) {
    for (size_t i = 0; i < ids.size(); ++i) {
        printf("%s%d", i ? " " : "", ids[i]);
    }
    printf("\n");
}

static void decode(llama_context * context, Ids & ids, bool all) {
    llama_batch batch = llama_batch_get_one(ids.data(), ids.size());
    std::vector<int8_t> wanted(ids.size(), 1);
    if (all) {
        batch.logits = wanted.data();
    }
    if (llama_decode(context, batch) != 0) {
        fail("llama_decode failed");
    }
}

int main(int argc, char ** argv) {
    if (argc < 3) {
        fail("usage: llama_cpp MODEL tokenize|logits|greedy [N]");
    }
    const std::string question = argv[2];
    llama_log_set([](ggml_log_level level, const char * text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    }, nullptr);
    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    model_params.vocab_only = question == "tokenize";
    llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        fail("the model does not load");
    }
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const size_t n_vocab = llama_vocab_n_tokens(vocab);

    if (question == "tokenize") {
        for (std::string text; std::getline(std::cin, text, '\0');) {
            Ids ids(text.size() + 8);
            const int n = llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), false, false);
            if (n < 0) {
                fail("llama_tokenize failed");
            }
            ids.resize(n);
            print(ids);
        }
        return 0;
    }

    llama_context_params params = llama_context_default_params();
    params.n_ctx = 0;
    params.n_threads = params.n_threads_batch = 2;
    // Keys and values in full: what is compared is the weights' arithmetic.
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        fail("no context");
    }
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        Ids ids;
        for (llama_token id; words >> id;) {
            ids.push_back(id);
        }
        llama_memory_clear(llama_get_memory(context), true);
        if (question == "logits") {
            decode(context, ids, true);
            fwrite(llama_get_logits(context), sizeof(float), ids.size() * n_vocab, stdout);
            continue;
        }
        Ids answer;
        for (int n = argc > 3 ? atoi(argv[3]) : 64; n > 0; --n) {
            decode(context, ids, false);
            const float * logits = llama_get_logits_ith(context, -1);
            ids = {llama_token(std::max_element(logits, logits + n_vocab) - logits)};
            answer.push_back(ids[0]);
        }
        print(answer);
    }
    return 0;
}
