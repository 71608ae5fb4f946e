//! [`SizeReport`]: bytes of the parts of a model, compared with f32.

use crate::{Encoding, FormatError, ModelSpec, PackedModel, archive, onnx, read_model};
use serde::Serialize;
use std::{fmt, fs, io, path::Path};

/// Size of a part of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct PartSize {
    /// Number of weights.
    pub weights: u64,
    /// Bytes, including scales.
    pub bytes: u64,
    /// `8 bytes / weights`; 0 without weights.
    pub bits_per_weight: f64,
    /// Bytes as f32 divided by `bytes`; 0 without weights.
    pub compression: f64,
}

impl PartSize {
    fn new(weights: u64, bytes: u64) -> Self {
        let ratio = |over: u64, under: u64| if under == 0 { 0.0 } else { over as f64 / under as f64 };
        Self {
            weights,
            bytes,
            bits_per_weight: ratio(8 * bytes, weights),
            compression: ratio(4 * weights, bytes),
        }
    }
}

/// Size of a model by part.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct SizeReport {
    /// Matrices of the transformer blocks: the ternary weights.
    pub blocks: PartSize,
    /// Token embedding; also the output head if they are tied.
    pub embedding: PartSize,
    /// Output head, if it is not the embedding.
    pub head: PartSize,
    /// Norms, biases and learned positions. For a file, also its header with the tokenizer.
    pub other: PartSize,
    /// All parts.
    pub total: PartSize,
    /// [`Self::LIMIT`].
    pub limit: f64,
}

impl SizeReport {
    /// `32 / log2(3)`: the compression limit of ternary weights at a fixed rate, without scales.
    pub const LIMIT: f64 = 20.189_752;

    /// Size of a model in memory.
    pub fn of_model(model: &PackedModel) -> Self {
        let sizes =
            model.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.shape(), tensor.bytes().len()));
        Self::sum(sizes)
    }

    /// Size of a model with the given encodings, computed without allocating it.
    ///
    /// # Errors
    /// `Spec`: sizes that contradict each other. `RowLength`: rows that do not fit the encoding.
    pub fn of_spec(
        spec: &ModelSpec,
        blocks: Encoding,
        embedding: Encoding,
        head: Encoding,
    ) -> Result<Self, FormatError> {
        spec.validate()?;
        let sizes = spec.tensors().map(|(name, shape)| {
            let encoding = match part(&name, shape.len()) {
                Part::Blocks => blocks,
                Part::Embedding => embedding,
                Part::Head => head,
                Part::Other => Encoding::F32,
            };
            let bytes = encoding.bytes(&shape).map_err(|error| error.in_tensor(&name))?;
            Ok((name, shape, bytes))
        });
        let sizes = sizes.collect::<Result<Vec<_>, FormatError>>()?;
        Ok(Self::sum(sizes.iter().map(|(name, shape, bytes)| (name.as_str(), shape.as_slice(), *bytes))))
    }

    /// Size of a model in a file or folder that [`write_model`](crate::write_model) wrote.
    ///
    /// # Errors
    /// Those of [`read_model`]. `Io`.
    pub fn of_file(path: &Path, spec: &ModelSpec) -> Result<Self, FormatError> {
        let file_bytes = length(path).map_err(FormatError::io(path))?;
        let stored = match path.extension().and_then(|extension| extension.to_str()) {
            Some("onnx") => onnx::initializers(path)?,
            Some("ternary") => archive::sizes(path)?,
            _ => return Ok(Self::of_model(&read_model(path)?).in_file(file_bytes)),
        };
        let sizes = spec.tensors().map(|(name, shape)| {
            // The scales of a matrix may be a tensor of their own.
            let scale = name.replace(".weight", ".scale");
            let own = stored.iter().filter(|(own, _)| *own == name || *own == scale);
            let bytes = own.map(|(_, bytes)| bytes).sum();
            (name, shape, bytes)
        });
        let sizes: Vec<_> = sizes.collect();
        let sizes = sizes.iter().map(|(name, shape, bytes)| (name.as_str(), shape.as_slice(), *bytes));
        Ok(Self::sum(sizes).in_file(file_bytes))
    }

    fn sum<'a>(sizes: impl Iterator<Item = (&'a str, &'a [usize], usize)>) -> Self {
        let mut parts = [(0, 0); 4];
        for (name, shape, bytes) in sizes {
            let (weights, sum) = &mut parts[part(name, shape.len()) as usize];
            *weights += shape.iter().map(|&n| n as u64).product::<u64>();
            *sum += bytes as u64;
        }
        Self::from_parts(parts)
    }

    fn from_parts(parts: [(u64, u64); 4]) -> Self {
        let total = parts.iter().fold((0, 0), |sum, part| (sum.0 + part.0, sum.1 + part.1));
        let [blocks, embedding, head, other, total] = [parts[0], parts[1], parts[2], parts[3], total]
            .map(|(weights, bytes)| PartSize::new(weights, bytes));
        Self { blocks, embedding, head, other, total, limit: Self::LIMIT }
    }

    /// The report for a file of `file_bytes` bytes. Bytes outside of the tensors count as `other`.
    pub fn in_file(self, file_bytes: u64) -> Self {
        let header = file_bytes.saturating_sub(self.total.bytes);
        let of = |part: PartSize| (part.weights, part.bytes);
        let other = (self.other.weights, self.other.bytes + header);
        Self::from_parts([of(self.blocks), of(self.embedding), of(self.head), other])
    }

    /// Bytes of the same model in f32.
    pub fn fp32_bytes(&self) -> u64 {
        4 * self.total.weights
    }
}

/// Bytes of a file, or of all files in a folder.
fn length(path: &Path) -> io::Result<u64> {
    if path.is_file() {
        return Ok(fs::metadata(path)?.len());
    }
    fs::read_dir(path)?.map(|entry| Ok(entry?.metadata()?.len())).sum()
}

enum Part {
    Blocks,
    Embedding,
    Head,
    Other,
}

fn part(name: &str, dimensions: usize) -> Part {
    match name {
        "token_embd.weight" => Part::Embedding,
        "output.weight" => Part::Head,
        _ if name.starts_with("blk.") && dimensions == 2 => Part::Blocks,
        _ => Part::Other,
    }
}

impl fmt::Display for SizeReport {
    /// Formats a table with one row per part.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rows = [
            ("blocks", self.blocks),
            ("embedding", self.embedding),
            ("head", self.head),
            ("other", self.other),
            ("whole", self.total),
        ];
        writeln!(f, "{:<10}{:>15}{:>15}{:>12}{:>9}", "part", "weights", "bytes", "bits/weight", "ratio")?;
        for (name, part) in rows.into_iter().filter(|(_, part)| part.bytes > 0) {
            writeln!(
                f,
                "{name:<10}{:>15}{:>15}{:>12.3}{:>8.2}x",
                part.weights, part.bytes, part.bits_per_weight, part.compression
            )?;
        }
        write!(
            f,
            "ratio: f32 bytes over bytes; the limit of ternary weights at a fixed rate is {:.2}x",
            self.limit
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activation, Family, Tensor};

    fn gpt2_small() -> ModelSpec {
        ModelSpec {
            family: Family::Gpt2,
            vocab_size: 50_257,
            context: 1024,
            d_model: 768,
            n_layers: 12,
            n_heads: 12,
            n_kv_heads: 12,
            d_ff: 3072,
            activation: Activation::Gelu,
            tied: true,
            norm_eps: 1e-5,
            rope_theta: 10_000.0,
        }
    }

    fn llama_2_7b() -> ModelSpec {
        ModelSpec {
            family: Family::Llama,
            vocab_size: 32_000,
            context: 4096,
            d_model: 4096,
            n_layers: 32,
            n_heads: 32,
            n_kv_heads: 32,
            d_ff: 11_008,
            activation: Activation::Swiglu,
            tied: false,
            ..gpt2_small()
        }
    }

    #[test]
    fn the_parts_of_every_kind_of_file_are_the_whole_file() {
        let spec = ModelSpec {
            vocab_size: 300,
            d_model: 128,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 4,
            d_ff: 256,
            context: 32,
            ..llama_2_7b()
        };
        let tensors = spec.tensors().map(|(name, shape)| {
            let tensor = match name.starts_with("blk.") && shape.len() == 2 {
                true => Tensor::ternary(shape[0], shape[1], shape[1], |row, codes, scales| {
                    codes.iter_mut().enumerate().for_each(|(i, code)| *code = ((i + row) % 3) as i8 - 1);
                    scales.fill(half::f16::ONE);
                }),
                false => Tensor::f32(&shape, &vec![0.5; shape.iter().product()]),
            };
            (name, tensor.unwrap())
        });
        let model = PackedModel {
            name: "parts".into(),
            tensors: tensors.collect(),
            spec: spec.clone(),
            tokenizer: None,
            chat_template: None,
            adapter: None,
            warnings: Vec::new(),
        };
        let folder = tempfile::tempdir().unwrap();
        // Codes of 2 bits; one scale per row of 128 or 256 weights; the embedding is f32.
        for (file, blocks) in
            [("m.gguf", 2.0 + 16.0 / 64.0), ("m.onnx", 2.0 + 32.0 / 150.0), ("bitnet", 2.0 + 16.0 / 150.0)]
        {
            let path = folder.path().join(file);
            crate::write_model(&model, &path, &crate::WriteOptions::default()).unwrap();
            let report = SizeReport::of_file(&path, &spec).unwrap();
            assert_eq!(report.total.bytes, length(&path).unwrap(), "{file}");
            assert_eq!(
                report.total.weights,
                spec.tensors().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum::<u64>()
            );
            assert_eq!(report.embedding.bytes, 300 * 128 * 4, "{file}");
            assert!(
                (report.blocks.bits_per_weight - blocks).abs() < 0.05,
                "{file}: {}",
                report.blocks.bits_per_weight
            );
        }
    }

    #[test]
    fn published_models_have_their_published_sizes() {
        let f32s = |spec| SizeReport::of_spec(&spec, Encoding::F32, Encoding::F32, Encoding::F32).unwrap();
        for (spec, parameters) in [
            (gpt2_small(), 124_439_808),
            (
                ModelSpec {
                    d_model: 1024,
                    n_layers: 24,
                    n_heads: 16,
                    n_kv_heads: 16,
                    d_ff: 4096,
                    ..gpt2_small()
                },
                354_823_168,
            ),
            (llama_2_7b(), 6_738_415_616),
        ] {
            let report = f32s(spec);
            assert_eq!((report.total.weights, report.total.bytes), (parameters, 4 * parameters));
            assert_eq!((report.total.compression, report.blocks.bits_per_weight), (1.0, 32.0));
        }
    }

    #[test]
    fn parts_are_counted_by_hand() {
        let report =
            SizeReport::of_spec(&gpt2_small(), Encoding::Tq1_0, Encoding::Q8_0, Encoding::Q8_0).unwrap();
        let matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072);
        assert_eq!((report.blocks.weights, report.blocks.bytes), (matrices, matrices / 256 * 54));
        assert_eq!(report.embedding.bytes, 50_257 * 768 / 32 * 34);
        assert_eq!(report.head.bytes, 0);
        assert!((report.blocks.bits_per_weight - 1.6875).abs() < 1e-12);
        assert!(report.blocks.compression < report.limit);
        let file = report.in_file(report.total.bytes + 1000);
        assert_eq!(
            (file.other.bytes, file.total.bytes),
            (report.other.bytes + 1000, report.total.bytes + 1000)
        );
        assert!((SizeReport::LIMIT - 32.0 / 3f64.log2()).abs() < 1e-6);
        assert!(report.to_string().contains("20.19x"), "{report}");
        assert_eq!(serde_json::to_value(report).unwrap()["blocks"]["bytes"], matrices / 256 * 54);
    }

    #[test]
    fn a_model_and_its_spec_have_the_same_size() {
        let spec = ModelSpec {
            vocab_size: 10,
            context: 8,
            d_model: 64,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 4,
            d_ff: 64,
            ..gpt2_small()
        };
        let tensors = spec.tensors().map(|(name, shape)| {
            let zeros = Tensor::f32(&shape, &vec![0.0; shape.iter().product()]).unwrap();
            let tensor = match part(&name, shape.len()) {
                Part::Blocks => Tensor::ternary(shape[0], shape[1], shape[1], |_, _, _| ()).unwrap(),
                _ => zeros,
            };
            (name, tensor)
        });
        let model = PackedModel {
            name: "zeros".into(),
            tensors: tensors.collect(),
            tokenizer: None,
            chat_template: None,
            adapter: None,
            warnings: Vec::new(),
            spec: spec.clone(),
        };
        let ternary = Encoding::Ternary { group: 64 };
        let expected = SizeReport::of_spec(&spec, ternary, Encoding::F32, Encoding::F32).unwrap();
        assert_eq!(SizeReport::of_model(&model), expected);
    }

    #[test]
    fn rows_that_do_not_fit_are_errors() {
        let spec = ModelSpec { d_ff: 3000, ..gpt2_small() };
        let error = SizeReport::of_spec(&spec, Encoding::Tq2_0, Encoding::F16, Encoding::F16).unwrap_err();
        assert!(error.to_string().contains("ffn_down"), "{error}");
    }
}
