//! From a folder to a [`PackedModel`].

use super::{config::Config, fused_third, transformers_name};
use crate::{
    Bytes, Encoding, Family, FormatError, PackedModel, Tensor, Tokenizer, disk,
    key::{self, KeyTable},
    safetensors::{self, Stored},
};
use ::safetensors::tensor::Dtype;
use half::f16;
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read,
    path::{Component, Path},
};

/// Limit of text files in a folder, in bytes.
const LONGEST_TEXT: u64 = 1 << 28;

/// Suffixes of buffers in older checkpoints. Models do not need them.
const BUFFERS: [&str; 3] = [".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"];

const GENERATION_CONFIG: &str = "generation_config.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Sampling settings do not change what a model computes. The caller chooses them.
const GENERATION_KEYS: KeyTable = KeyTable {
    prefix: "",
    used: &["bos_token_id", "eos_token_id"],
    fixed: &[],
    neutral: &[
        "_*",
        "assistant_*",
        "cache_implementation",
        "chat_format",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "epsilon_cutoff",
        "eta_cutoff",
        "is_assistant",
        "length_penalty",
        "max_*",
        "min_*",
        "num_*",
        "output_*",
        "pad_token_id",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict*",
        "temperature",
        "top_*",
        "torch_dtype",
        "transformers_version",
        "trust_remote_code",
        "typical_p",
        "use_cache",
    ],
};

/// The tokenizer itself is in `tokenizer.json`.
const TOKENIZER_KEYS: KeyTable = KeyTable {
    prefix: "",
    used: &["chat_template"],
    fixed: &[],
    neutral: &[
        "_*",
        "add_*",
        "added_tokens_decoder",
        "additional_special_tokens",
        "auto_map",
        "backend",
        "bos_token",
        "clean_up_tokenization_spaces",
        "cls_token",
        "eos_token",
        "errors",
        "extra_special_tokens",
        "is_local",
        "legacy",
        "mask_token",
        "max_length",
        "model_input_names",
        "model_max_length",
        "model_specific_special_tokens",
        "name_or_path",
        "pad_*",
        "padding_side",
        "processor_class",
        "sep_token",
        "sp_model_kwargs",
        "spaces_between_special_tokens",
        "special_tokens_map_file",
        "split_special_tokens",
        "stride",
        "tokenizer_class",
        "tokenizer_file",
        "truncation_*",
        "trust_remote_code",
        "unk_token",
        "use_*",
        "vocab_size",
    ],
};

/// Reads a folder. Tensors stay in the memory-mapped files, except those that are stored transposed or packed.
///
/// # Errors
/// `Io`, `Json`, `Safetensors`: files that are missing or damaged. `Spec`, `Value`: an unsupported model.
/// `MissingTensor`, `UnknownTensor`, `WrongShape`, `StoredType`, `NotACode`: tensors that do not match the model.
/// `Shard`: an index that names a file outside of the folder.
pub fn read(folder: &Path) -> Result<PackedModel, FormatError> {
    let path = folder.join("config.json");
    let config = Config::parse(&read_text(&path)?).map_err(|error| error.in_file(&path))?;
    let mut checkpoint = Checkpoint::open(folder)?;
    let mut spec = config.spec.clone();
    // As in transformers 5: a stored output head is used, whatever the configuration says.
    spec.tied = match checkpoint.head_is_embedding(spec.family).map_err(|error| error.in_file(folder))? {
        None => config.tied.unwrap_or(true),
        Some(same) => same && config.tied == Some(true),
    };
    if spec.tied {
        checkpoint.used.insert("lm_head.weight".into()); // equal to the embedding
    }
    let tensors = spec
        .tensors()
        .map(|(name, shape)| {
            let tensor = checkpoint.tensor(&config, &name, &shape);
            Ok((name.clone(), tensor.map_err(|error| error.in_file(folder))?))
        })
        .collect::<Result<_, FormatError>>()?;
    checkpoint.check_all_used().map_err(|error| error.in_file(folder))?;
    let name = fs::canonicalize(folder).map_err(FormatError::io(folder))?;
    let name = name.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    let mut warnings = Vec::from_iter(config.warning);
    let tokenizer = tokenizer(folder, &mut warnings)?;
    let chat_template = chat_template(folder, &mut warnings)?;
    let model = PackedModel { name, spec, tensors, tokenizer, chat_template, adapter: None, warnings };
    model.validate().map_err(|error| error.in_file(folder))?;
    Ok(model)
}

/// Reads a file of at most [`LONGEST_TEXT`] bytes.
pub(super) fn read_text(path: &Path) -> Result<Vec<u8>, FormatError> {
    let file = disk::open(path).map_err(FormatError::io(path))?;
    let length = file.metadata().map_err(FormatError::io(path))?.len();
    if length > LONGEST_TEXT {
        return Err(FormatError::TooLong { expected: LONGEST_TEXT, found: length }.in_file(path));
    }
    let mut bytes = Vec::new();
    file.take(length).read_to_end(&mut bytes).map_err(FormatError::io(path))?;
    Ok(bytes)
}

/// Reads a JSON file.
pub(super) fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T, FormatError> {
    serde_json::from_slice(&read_text(path)?).map_err(|error| FormatError::from(error).in_file(path))
}

/// The tokenizer, if any, with the begin and end tokens of `generation_config.json` and `config.json`.
fn tokenizer(folder: &Path, warnings: &mut Vec<String>) -> Result<Option<Tokenizer>, FormatError> {
    let path = folder.join("tokenizer.json");
    if !path.exists() {
        return Ok(None);
    }
    let configs = [GENERATION_CONFIG, "config.json"].map(|name| folder.join(name));
    let configs = configs.iter().filter(|path| path.exists()).map(|path| read_json(path));
    let configs = configs.collect::<Result<Vec<Value>, _>>()?;
    if let (true, Some(Value::Object(generation))) =
        (folder.join(GENERATION_CONFIG).exists(), configs.first())
    {
        let warning = key::check(&[GENERATION_KEYS], GENERATION_CONFIG, key::entries(generation, &[]))?;
        warnings.extend(warning);
    }
    let tokenizer = super::tokenizer::from_json(&read_text(&path)?, &configs);
    tokenizer.map(Some).map_err(|error| error.in_file(&path))
}

/// The chat template from its own file, as transformers writes it since 4.52, or from `tokenizer_config.json`.
fn chat_template(folder: &Path, warnings: &mut Vec<String>) -> Result<Option<String>, FormatError> {
    let config = folder.join(TOKENIZER_CONFIG);
    let config: Option<Value> = config.exists().then(|| read_json(&config)).transpose()?;
    if let Some(Value::Object(config)) = &config {
        warnings.extend(key::check(&[TOKENIZER_KEYS], TOKENIZER_CONFIG, key::entries(config, &[]))?);
    }
    let path = folder.join("chat_template.jinja");
    if path.exists() {
        let text = String::from_utf8(read_text(&path)?);
        let error = |_| FormatError::NotUtf8 { what: "a chat template", offset: 0 }.in_file(&path);
        return text.map(Some).map_err(error);
    }
    // A few old folders have a list of named templates instead, which is not supported.
    Ok(config.and_then(|config| config["chat_template"].as_str().map(String::from)))
}

/// The tensors of all files of a folder.
struct Checkpoint {
    tensors: BTreeMap<String, Stored>,
    used: BTreeSet<String>,
    /// Whether a gpt2 model uses `nn.Linear` (minGPT, nanoGPT) in place of `Conv1D`.
    linear: bool,
}

impl Checkpoint {
    fn open(folder: &Path) -> Result<Self, FormatError> {
        let (whole, index) = (folder.join("model.safetensors"), folder.join("model.safetensors.index.json"));
        // A single file takes precedence, as in transformers: saving twice to one folder may leave an old index.
        let tensors = match index.exists() && !whole.exists() {
            true => read_shards(folder, &index)?,
            false => safetensors::read(&whole)?,
        };
        // The only weight of a gpt2 model whose shape shows the order in which it is stored.
        let linear = tensors
            .get("transformer.h.0.attn.c_attn.weight")
            .is_some_and(|fused| fused.shape.len() == 2 && fused.shape[0] > fused.shape[1]);
        Ok(Self { tensors, used: BTreeSet::new(), linear })
    }

    /// The tensor that is named `ours` in a [`PackedModel`].
    fn tensor(&mut self, config: &Config, ours: &str, shape: &[usize]) -> Result<Tensor, FormatError> {
        let family = config.spec.family;
        let name = transformers_name(family, ours);
        let Some(stored) = self.tensors.get(&name).cloned() else {
            // A checkpoint of the gpt2 family may omit biases that are zero.
            if family == Family::Gpt2 && name.ends_with(".bias") {
                return Tensor::f32(shape, &vec![0.0; shape.iter().product()]);
            }
            return Err(FormatError::MissingTensor { tensor: name });
        };
        let matrix = ours.starts_with("blk.") && shape.len() == 2;
        let tensor = if family == Family::Gpt2 {
            gpt2_tensor(stored, shape, fused_third(family, ours), matrix && !self.linear)
                .and_then(Stored::float)
        } else if let (true, Some(quantization)) = (matrix, &config.quantization) {
            self.scale(&name).and_then(|scale| {
                let scale = if quantization.is_inverse() { 1.0 / scale } else { scale };
                unpack_bitnet(&stored, shape, f16::from_f32(scale))
            })
        } else {
            expect_shape(shape, &stored.shape).and_then(|()| stored.float())
        };
        self.used.insert(name.clone());
        tensor.map_err(|error| error.in_tensor(&name))
    }

    /// Returns whether the stored output head equals the embedding; `None` if no head is stored.
    fn head_is_embedding(&self, family: Family) -> Result<Option<bool>, FormatError> {
        let [head, embedding] = ["output.weight", "token_embd.weight"]
            .map(|ours| self.tensors.get(&transformers_name(family, ours)));
        let (Some(head), Some(embedding)) = (head, embedding) else { return Ok(head.map(|_| false)) };
        if head.shape != embedding.shape || head.shape.len() != 2 {
            return Ok(Some(false));
        }
        if head.dtype == embedding.dtype {
            return Ok(Some(*head.bytes == *embedding.bytes));
        }
        let [head, embedding] = [head.clone().float()?, embedding.clone().float()?];
        let (mut left, mut right) = (vec![0.0; head.cols()], vec![0.0; head.cols()]);
        Ok(Some((0..head.rows()).all(|row| {
            head.read_row(row, &mut left);
            embedding.read_row(row, &mut right);
            left == right
        })))
    }

    /// The `weight_scale` of a packed matrix.
    fn scale(&mut self, weight: &str) -> Result<f32, FormatError> {
        let name = format!("{weight}_scale");
        let Some(stored) = self.tensors.get(&name).cloned() else {
            return Err(FormatError::MissingTensor { tensor: name });
        };
        self.used.insert(name);
        if stored.shape.iter().product::<usize>() != 1 {
            return Err(FormatError::WrongShape { expected: vec![1], found: stored.shape });
        }
        let mut scale = [0.0];
        Stored { shape: vec![1], ..stored }.float()?.read_row(0, &mut scale);
        Ok(scale[0])
    }

    /// Checks that all tensors were used. One that was not belongs to a model that computes something else.
    fn check_all_used(&self) -> Result<(), FormatError> {
        let unused = self
            .tensors
            .keys()
            .find(|name| !self.used.contains(*name) && !BUFFERS.iter().any(|buffer| name.ends_with(buffer)));
        unused.map_or(Ok(()), |name| Err(FormatError::UnknownTensor { tensor: name.clone() }))
    }
}

/// The tensors of all shards that an index names.
fn read_shards(folder: &Path, index: &Path) -> Result<BTreeMap<String, Stored>, FormatError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let places = read_json::<Index>(index)?.weight_map;
    let mut tensors = BTreeMap::new();
    for shard in places.values().collect::<BTreeSet<_>>() {
        let mut parts = Path::new(shard).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(FormatError::Shard { shard: shard.clone() }.in_file(index));
        }
        // A tensor may occur in several shards. The index decides.
        let is_here = |(name, _): &(String, Stored)| places.get(name).is_none_or(|place| place == shard);
        tensors.extend(safetensors::read(&folder.join(shard))?.into_iter().filter(is_here));
    }
    match places.keys().find(|name| !tensors.contains_key(*name)) {
        Some(name) => Err(FormatError::MissingTensor { tensor: name.clone() }.in_file(index)),
        None => Ok(tensors),
    }
}

pub(super) fn expect_shape(expected: &[usize], found: &[usize]) -> Result<(), FormatError> {
    if expected == found {
        return Ok(());
    }
    Err(FormatError::WrongShape { expected: expected.into(), found: found.into() })
}

/// A tensor of a gpt2 model as `[out, in]`: a third of a fused one, or transposed from `[in, out]` of `Conv1D`.
fn gpt2_tensor(
    stored: Stored,
    shape: &[usize],
    third: Option<usize>,
    transposed: bool,
) -> Result<Stored, FormatError> {
    let out = shape[0];
    let mut expected = shape.to_vec();
    expected[0] *= third.map_or(1, |_| 3);
    let columns = expected[0];
    if transposed {
        expected.reverse();
    }
    expect_shape(&expected, &stored.shape)?;
    let first = third.unwrap_or(0) * out;
    let size = stored.encoding()?.bytes(&[1])?;
    let bytes: Bytes = if transposed {
        let at = |row: usize, column: usize| {
            let start = (row * columns + first + column) * size;
            &stored.bytes[start..start + size]
        };
        let inputs = shape[1];
        let values = (0..out).flat_map(|column| (0..inputs).map(move |row| (row, column)));
        let mut bytes = Vec::with_capacity(out * inputs * size);
        values.for_each(|(row, column)| bytes.extend_from_slice(at(row, column)));
        bytes.into()
    } else {
        let row = size * shape[1..].iter().product::<usize>();
        stored.bytes.slice(first * row..(first + out) * row)
    };
    Ok(Stored { shape: shape.into(), bytes, ..stored })
}

/// Unpacks the codes of BitNet; see the [module](super) for their layout.
fn unpack_bitnet(stored: &Stored, shape: &[usize], scale: f16) -> Result<Tensor, FormatError> {
    let [rows, cols] = [shape[0], shape[1]];
    expect_shape(&[rows / 4, cols], &stored.shape)?;
    if stored.dtype != Dtype::U8 {
        return Err(FormatError::StoredType { expected: "U8", found: stored.dtype });
    }
    if rows % 4 != 0 {
        return Err(FormatError::RowCount { rows });
    }
    if !(scale.is_finite() && scale.is_sign_positive()) {
        return Err(FormatError::Scale { scale: scale.to_f32() });
    }
    Tensor::from_codes(Encoding::Ternary { group: cols }, rows, cols, |row, codes, scales| {
        let (plane, packed) = (row / (rows / 4), row % (rows / 4));
        let bytes = &stored.bytes[packed * cols..(packed + 1) * cols];
        codes.iter_mut().zip(bytes).for_each(|(code, byte)| *code = (byte >> (2 * plane) & 3) as i8 - 1);
        scales.fill(scale);
    })
}
