//! Measures a model file on this machine: tokens per second of prefill, decode and batched decode, memory, and the share of
//! the machine's read bandwidth that decode reaches.
//!
//! ```sh
//! cargo run --release --example bench -- MODEL.gguf --threads 2 --prompt 512 --generate 128 --json
//! cargo run --release --example bench -- --shape duck                     # random weights
//! cargo run --release --example bench -- --shape duck --write duck.gguf   # writes them to a file, for other programs
//! ```

mod machine;
mod shape;

use clap::Parser;
use serde::Serialize;
use shape::Shape;
use std::{
    collections::HashMap,
    error::Error,
    path::{Path, PathBuf},
    time::Instant,
};
use ternary_format::{
    Encoding, FormatError, PackedModel,
    gguf::{self, GgufOptions},
};
use ternary_infer::{CacheType, Engine, EngineOptions, Sequence};

/// Measures the speed of a model file, or of random weights.
#[derive(Parser)]
struct Options {
    /// GGUF file.
    #[arg(required_unless_present = "shape")]
    model: Option<PathBuf>,
    /// Use random ternary weights of this shape instead of a file.
    #[arg(long, conflicts_with = "model")]
    shape: Option<Shape>,
    /// Write the random weights to this GGUF file, and do not measure.
    #[arg(long, requires = "shape")]
    write: Option<PathBuf>,
    /// Storage type of the transformer blocks in that file.
    #[arg(long = "type", default_value = "tq2_0", requires = "write")]
    encoding: Type,
    /// Number of threads.
    #[arg(long, default_value_t = std::thread::available_parallelism().map_or(1, usize::from))]
    threads: usize,
    /// Prompt length, in tokens.
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Number of tokens to generate.
    #[arg(long, default_value_t = 128)]
    generate: usize,
    /// Tokens in the KV cache before a single sequence is generated.
    #[arg(long, default_value_t = 0)]
    held: usize,
    /// Precision of the KV cache.
    #[arg(long, default_value = "f16")]
    cache: Cache,
    /// Number of sequences that are decoded together.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Number of measured runs, after a warm-up run; the report has their median.
    #[arg(long, default_value_t = 5)]
    repetitions: usize,
    /// Print the report as one line of JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Type {
    F16,
    #[value(name = "tq1_0")]
    Tq1_0,
    #[value(name = "tq2_0")]
    Tq2_0,
    #[value(name = "q2_0")]
    Q2_0,
}

#[derive(Clone, Copy, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Cache {
    F16,
    Int8,
}

impl From<Cache> for CacheType {
    fn from(name: Cache) -> Self {
        match name {
            Cache::F16 => Self::F16,
            Cache::Int8 => Self::Int8,
        }
    }
}

impl From<Type> for Encoding {
    fn from(name: Type) -> Self {
        match name {
            Type::F16 => Self::F16,
            Type::Tq1_0 => Self::Tq1_0,
            Type::Tq2_0 => Self::Tq2_0,
            Type::Q2_0 => Self::Q2_0,
        }
    }
}

#[derive(Serialize)]
struct Report {
    model: String,
    threads: usize,
    prompt: usize,
    generate: usize,
    held: usize,
    batch: usize,
    repetitions: usize,
    cache: Cache,
    load_s: f64,
    /// Size of the matrices that each generated token reads.
    weight_bytes: usize,
    prompt_tokens_per_s: f64,
    generate_tokens_per_s: f64,
    /// Sum over all sequences.
    batch_tokens_per_s: f64,
    /// KV cache of one sequence, of the longest length that is measured.
    cache_bytes: usize,
    /// Peak of loading, the prompt and generation.
    peak_resident_bytes: Option<u64>,
    /// Measured read bandwidth of the machine.
    bandwidth_bytes_per_s: f64,
    /// Weight bytes read per second by decode, divided by that bandwidth.
    bandwidth_share: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let start = Instant::now();
    let model = match (&options.model, options.shape, &options.write) {
        (_, Some(shape), Some(path)) => return Ok(write(shape, path, options.encoding.into())?),
        (_, Some(shape), None) => random(shape)?,
        (Some(path), ..) => gguf::read(path)?,
        _ => unreachable!("clap requires one of the two"),
    };
    let report = measure(model, &options, start)?;
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print(&report);
    }
    Ok(())
}

fn random(shape: Shape) -> Result<PackedModel, FormatError> {
    let mut model = shape.model();
    for (name, shape) in model.spec.tensors() {
        let tensor = shape::tensor(&name, &shape)?;
        model.tensors.insert(name, tensor);
    }
    Ok(model)
}

/// Writes random weights. Only one tensor is in memory at a time.
fn write(shape: Shape, path: &Path, blocks: Encoding) -> Result<(), FormatError> {
    let model = shape.model();
    let shapes: HashMap<_, _> = model.spec.tensors().collect();
    let embedding = if blocks.is_ternary() { Encoding::Q8_0 } else { blocks };
    let options = GgufOptions::new(blocks).with_embedding(embedding).with_head(embedding);
    gguf::write_with(&model, path, &options, |name| shape::tensor(name, &shapes[name]))
}

fn measure(model: PackedModel, options: &Options, start: Instant) -> Result<Report, Box<dyn Error>> {
    let weight_bytes = weight_bytes(&model);
    let name = model.name.clone();
    let context = options.prompt.max(options.held.max(BATCH_PROMPT) + options.generate);
    let cache = options.cache.into();
    let engine_options =
        EngineOptions::default().with_threads(options.threads).with_context(context).with_cache(cache);
    let engine = Engine::from_model(model, engine_options)?;
    let load_s = start.elapsed().as_secs_f64();

    let prompt = tokens_per_s(options, &engine, 1, 0, |sequences| {
        engine.prefill(&mut sequences[0], &ids(&engine, options.prompt))?;
        Ok(options.prompt)
    })?;
    let generate = tokens_per_s(options, &engine, 1, options.held, |sequences| {
        decode(&engine, sequences, options.generate)
    })?;
    // Measured before the sequences of the batch and the block for the bandwidth are allocated.
    let peak_resident_bytes = machine::peak_resident_bytes();
    let batch = tokens_per_s(options, &engine, options.batch, BATCH_PROMPT, |sequences| {
        decode(&engine, sequences, options.generate)
    })?;
    let bandwidth = machine::read_bandwidth(options.threads)?;
    Ok(Report {
        model: name,
        threads: options.threads,
        prompt: options.prompt,
        generate: options.generate,
        held: options.held,
        batch: options.batch,
        repetitions: options.repetitions,
        cache: options.cache,
        load_s,
        weight_bytes,
        prompt_tokens_per_s: prompt,
        generate_tokens_per_s: generate,
        batch_tokens_per_s: batch,
        cache_bytes: engine.sequence().cache_bytes(),
        peak_resident_bytes,
        bandwidth_bytes_per_s: bandwidth,
        bandwidth_share: weight_bytes as f64 * generate / bandwidth,
    })
}

/// Tokens in the KV cache of each sequence before the batch is decoded. llama.cpp's batched bench requires some.
const BATCH_PROMPT: usize = 16;

/// Median speed of `work`, which returns its number of tokens, on sequences of `held` tokens. Sequences are reused between
/// runs, as in other benches.
fn tokens_per_s(
    options: &Options,
    engine: &Engine,
    sequences: usize,
    held: usize,
    mut work: impl FnMut(&mut [Sequence]) -> Result<usize, Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    let mut speeds = Vec::new();
    let mut sequences: Vec<Sequence> = (0..sequences).map(|_| engine.sequence()).collect();
    for _ in 0..=options.repetitions {
        for sequence in &mut sequences {
            sequence.truncate(0);
            if held > 0 {
                engine.prefill(sequence, &ids(engine, held))?;
            }
        }
        let start = Instant::now();
        let tokens = work(&mut sequences)?;
        speeds.push(tokens as f64 / start.elapsed().as_secs_f64());
    }
    let speeds = &mut speeds[1..];
    speeds.sort_by(f64::total_cmp);
    Ok(speeds[speeds.len() / 2])
}

/// Decodes given tokens in all sequences together: the cost of generation without sampling, as other benches measure it.
fn decode(engine: &Engine, sequences: &mut [Sequence], tokens: usize) -> Result<usize, Box<dyn Error>> {
    let count = tokens * sequences.len();
    for id in ids(engine, tokens) {
        let mut batch: Vec<_> = sequences.iter_mut().map(|sequence| (sequence, id)).collect();
        engine.decode_batch(&mut batch)?;
    }
    Ok(count)
}

/// Ids that are spread over the vocabulary.
fn ids(engine: &Engine, count: usize) -> Vec<u32> {
    (0..count).map(|i| (i * 7919 % engine.spec().vocab_size) as u32).collect()
}

/// Bytes of all matrices. The embedding counts only if it is also the head.
fn weight_bytes(model: &PackedModel) -> usize {
    let skipped =
        |name: &str| name == "position_embd.weight" || name == "token_embd.weight" && !model.spec.tied;
    let matrices = model.tensors.iter().filter(|(name, tensor)| tensor.shape().len() == 2 && !skipped(name));
    matrices.map(|(_, tensor)| tensor.bytes().len()).sum()
}

fn print(report: &Report) {
    println!("{}, {} threads, loaded in {:.2} s", report.model, report.threads, report.load_s);
    println!("prompt of {:4}       {:8.1} tokens/s", report.prompt, report.prompt_tokens_per_s);
    println!("generation of {:4}   {:8.1} tokens/s", report.generate, report.generate_tokens_per_s);
    println!("{:2} sequences         {:8.1} tokens/s together", report.batch, report.batch_tokens_per_s);
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    println!("KV cache           {:8.1} MiB per sequence", mib(report.cache_bytes as f64));
    if let Some(bytes) = report.peak_resident_bytes {
        println!("peak memory        {:8.1} MiB", mib(bytes as f64));
    }
    println!(
        "weights of {:.1} MB per token: {:.0} % of the {:.1} GB/s that {} threads read",
        report.weight_bytes as f64 / 1e6,
        100.0 * report.bandwidth_share,
        report.bandwidth_bytes_per_s / 1e9,
        report.threads
    );
}
