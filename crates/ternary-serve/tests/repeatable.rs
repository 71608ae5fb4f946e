//! A seed gives the same text, alone and among others.

use crate::site::{Site, alone, engine};
use serde_json::{Value, json};
use ternary_infer::Sampling;

#[test]
fn a_seed_gives_the_same_text_alone_and_among_others() {
    let site = Site::new(|options| options.limits.batch = 12);
    let tokenizer = engine();
    let tokenizer = tokenizer.tokenizer().unwrap();
    // Some prompts are many chunks long, some begin alike, and n takes turns.
    let long = "the duck swims on the pond and the pond is cold ".repeat(6);
    let prompts: Vec<String> = (0..24u64)
        .map(|i| match i % 4 {
            0 => long.clone(),
            1 => format!("{long}{i}"),
            2 => format!("{i} short"),
            _ => long[..(i as usize * 7) % long.len()].to_string() + "x",
        })
        .collect();
    let sampling = |seed: u64| {
        Sampling::default()
            .with_seed(seed)
            .with_temperature(0.9)
            .with_top_k(if seed.is_multiple_of(2) { 40 } else { 0 })
            .with_repetition_penalty(if seed.is_multiple_of(3) { 1.1f64 as f32 } else { 1.0 })
    };
    std::thread::scope(|scope| {
        let site = &site;
        for round in 0..2u64 {
            let answers: Vec<_> = prompts
                .iter()
                .enumerate()
                .map(|(i, prompt)| {
                    let seed = i as u64 + 100 * round;
                    let n = 1 + i % 3;
                    let body = json!({
                        "model": "duck", "prompt": prompt, "seed": seed, "n": n, "max_tokens": 40, "temperature": 0.9,
                        "top_k": if seed.is_multiple_of(2) { 40 } else { 0 },
                        "repetition_penalty": if seed.is_multiple_of(3) { 1.1 } else { 1.0 },
                    });
                    (seed, n, prompt, scope.spawn(move || site.post("/v1/completions", &body).json()))
                })
                .collect();
            for (seed, n, prompt, answer) in answers {
                let answer: Value = answer.join().unwrap();
                for index in 0..n {
                    // The engine's own seed counts from the request's.
                    let expected = sampling(seed).with_seed(seed + index as u64);
                    let (text, ..) = alone(&engine(), &tokenizer.encode(prompt).unwrap(), expected, 40);
                    assert_eq!(
                        answer["choices"][index]["text"], text,
                        "seed {seed}, choice {index}, prompt {prompt}"
                    );
                }
            }
        }
    });
    assert!(
        site.metric("duck_step_texts_total") > 1.5 * site.metric("duck_steps_total"),
        "they shared passes"
    );
    assert!(site.metric("duck_prompt_reused_tokens_total") > 0.0, "what was known was not read again");
}

#[test]
fn without_a_seed_texts_differ() {
    let site = Site::new(|_| ());
    let body = json!({ "model": "duck", "prompt": "One day", "max_tokens": 20 });
    let texts: Vec<Value> =
        (0..4).map(|_| site.post("/v1/completions", &body).json()["choices"][0]["text"].clone()).collect();
    assert!(texts.iter().any(|text| *text != texts[0]));
}
