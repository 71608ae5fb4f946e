//! Evaluates a model file for tests/readers/llama_cpp.py, with the commands of tests/readers/llama_cpp.cpp.
//!
//! ```text
//! probe MODEL tokenize         texts on stdin, each ended by a zero byte -> one line of ids per text
//! probe MODEL logits           lines of ids -> float32 logits of every position
//! probe MODEL greedy N         lines of ids -> one line per input line: N ids of greedy decoding
//! ```

use std::{
    env,
    error::Error,
    io::{self, Read, Write},
};
use ternary_format::gguf;
use ternary_infer::{Engine, EngineOptions, GenerateOptions, Sampling};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [path, question, count @ ..] = &arguments[..] else {
        return Err("usage: probe MODEL tokenize|logits|greedy [N]".into());
    };
    let model = gguf::read(path.as_ref())?;
    let mut input = String::new();
    io::stdin().read_to_string(&mut input)?;
    let mut output = io::BufWriter::new(io::stdout());
    if question == "tokenize" {
        let tokenizer = model.tokenizer.as_ref().ok_or("the model has no tokenizer")?;
        for text in input.split_terminator('\0') {
            write_ids(&mut output, &tokenizer.encode(text)?)?;
        }
        return Ok(());
    }
    let engine = Engine::from_model(model, EngineOptions::default().with_threads(2))?;
    for line in input.lines() {
        let ids = line.split(' ').map(str::parse).collect::<Result<Vec<u32>, _>>()?;
        if question == "logits" {
            for logit in engine.logits(&ids)? {
                output.write_all(&logit.to_le_bytes())?;
            }
        } else {
            let max_tokens = count.first().map_or(Ok(64), |count| count.parse())?;
            let options =
                GenerateOptions::default().with_sampling(Sampling::greedy()).with_max_tokens(max_tokens);
            write_ids(&mut output, &engine.generate(&ids, options)?.collect::<Vec<_>>())?;
        }
    }
    Ok(output.flush()?)
}

fn write_ids(output: &mut impl Write, ids: &[u32]) -> io::Result<()> {
    let words: Vec<String> = ids.iter().map(u32::to_string).collect();
    writeln!(output, "{}", words.join(" "))
}
