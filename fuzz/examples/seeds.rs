//! Writes the corpus that fuzzing begins with: `cargo run --manifest-path fuzz/Cargo.toml --example seeds`.

use burn_ternary_fuzz::{archives, files, tokenizers};
use std::{fs, io, path::Path};
use ternary_format::chat;

/// What templates of published models consist of.
const TEMPLATES: [&str; 5] = [
    chat::TEMPLATE,
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\n' }}{% endif %}{{ m['role'] + '\n' + m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\0hi\0you",
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}{{ bos_token + '[INST] ' + m['content'].strip().replace('a', 'b').split(' ')[-1] + eos_token }}{% endfor %}\0a b",
    "{% macro f(x, y=1) %}{{ x ~ y | upper }}{% endmacro %}{% set ns = namespace(n=0) %}{% for a in range(9) %}{% set ns.n = ns.n + a // 2 %}{% if ns.n > 7 %}{% break %}{% endif %}{% endfor %}{{ f(ns.n) }}{{ {'a': [1, 2.5]} | tojson(indent=2) }}",
    "{%- for k, v in {'a': 'x' * 9, 'b': 'y'}.items() | sort(reverse=true) %}{{ k | replace('a', v) | join(',') }}{{ [1, 2] | map('abs') | list | batch(2) }}{% endfor -%}{{ 'a%s' | format(1) }}{{ '%'.join(['a', 'b']) }}{{ 'x' | center(20) | indent(4) }}",
];

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let write = |target: &str, seeds: Vec<Vec<u8>>| {
        let folder = corpus.join(target);
        fs::create_dir_all(&folder)?;
        seeds.iter().enumerate().try_for_each(|(i, seed)| fs::write(folder.join(format!("seed{i}")), seed))
    };
    write("gguf", files())?;
    write("archive", archives())?;
    write("tokenizer", tokenizers().map(Vec::from).into())?;
    write("chat_template", TEMPLATES.map(Vec::from).into())?;
    // Folders are edits of sound ones: any bytes.
    write("huggingface", (0..16).map(|seed| vec![seed; 16]).collect())
}
