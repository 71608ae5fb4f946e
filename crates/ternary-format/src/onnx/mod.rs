//! ONNX graphs of the whole decoder with a KV cache. onnxruntime runs them, and programs that load exports of
//! optimum.
//!
//! | name | shape | content |
//! |---|---|---|
//! | `input_ids` | `[batch, seq]` i64 | new tokens |
//! | `attention_mask` | `[batch, past + seq]` i64 | 0 at padding, else 1 |
//! | `position_ids` | `[batch, seq]` i64 | positions of the new tokens |
//! | `past_key_values.N.{key,value}` | `[batch, n_kv_heads, past, head_dim]` f32 | KV cache of block `N`; `past` may be 0 |
//! | `logits` | `[batch, seq, vocab]` f32 | output |
//! | `present.N.{key,value}` | `[batch, n_kv_heads, past + seq, head_dim]` f32 | KV cache for the next call |
//!
//! The metadata of the file contains the chat template and the spec. A file is one protobuf message, so it has at
//! most 2 GiB.

mod graph;
mod layer;
mod proto;
mod weight;

use crate::{Encoding, FormatError, PackedModel, WeightType, WriteOptions, disk};
use graph::{Element, GraphBuilder};
use layer::Decoder;
use prost::Message;
use proto::{Model, OperatorSet, Property, Size};
use std::{io::Write, path::Path};

/// The type of the matrices of the blocks where none is selected.
pub(crate) const DEFAULT_TYPE: WeightType = WeightType::Int2;

/// Writes a model atomically.
///
/// `INT2`, the default, is a type of ONNX 1.20 (opset 25), which onnxruntime supports since 1.25. `MATMULNBITS2` and
/// `MATMULNBITS4` use an operator of onnxruntime, with opset 21. So does a `Q8_0` embedding, with any weight type.
///
/// # Errors
/// Those of [`PackedModel::validate`] and [`PackedModel::merged`]. `NotTernary`, `Group`, `RowLength`, `WeightType`:
/// weights that do not fit the type. `OnnxSize`: more than 2 GiB. `Io`.
pub fn write(model: &PackedModel, path: &Path, options: &WriteOptions) -> Result<(), FormatError> {
    let bytes = encode(model, options)?;
    disk::atomic_write(path, |file| file.write_all(&bytes).map_err(FormatError::io(path)))
}

/// The bytes of a file.
///
/// # Errors
/// Those of [`write()`], except `Io`.
pub fn encode(model: &PackedModel, options: &WriteOptions) -> Result<Vec<u8>, FormatError> {
    model.validate()?;
    let model = &*model.merged()?;
    let weight_type = options.weights.unwrap_or(DEFAULT_TYPE);
    if let WeightType::Bitnet | WeightType::Encoded(Encoding::Tq2_0 | Encoding::Tq1_0 | Encoding::Q2_0) =
        weight_type
    {
        return Err(weight::unsupported(weight_type));
    }
    let graph = build(model, weight_type, options)?.build(&model.name);
    let (opset, ir_version) = if weight_type == WeightType::Int2 { (25, 13) } else { (21, 10) };
    let domains = [("", opset), (weight::MICROSOFT, 1)];
    let used = |domain: &str| graph.node.iter().any(|node| node.domain == domain);
    let opset_import = domains
        .into_iter()
        .filter(|(domain, _)| used(domain))
        .map(|(domain, version)| OperatorSet { domain: domain.into(), version })
        .collect();
    let property = |key: &str, value: String| Property { key: key.into(), value };
    let spec = serde_json::to_string(&model.spec).expect("a spec is JSON");
    let mut metadata_props = vec![property("spec", spec)];
    metadata_props.extend(model.chat_template.clone().map(|text| property("chat_template", text)));
    let message = Model {
        ir_version,
        producer_name: env!("CARGO_PKG_NAME").into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        graph: Some(graph),
        opset_import,
        metadata_props,
    };
    if message.encoded_len() > graph::LARGEST_FILE {
        return Err(FormatError::OnnxSize { limit: graph::LARGEST_FILE });
    }
    Ok(message.encode_to_vec())
}

/// Names of the initializers (constants) of a file, and their bytes.
///
/// # Errors
/// `Io`
pub(crate) fn initializers(path: &Path) -> Result<Vec<(String, usize)>, FormatError> {
    let read = || Ok(Model::decode(&disk::read(path)?[..])?);
    let graph = read().map_err(FormatError::io(path))?.graph.unwrap_or_default();
    Ok(graph.initializer.into_iter().map(|constant| (constant.name, constant.raw_data.len())).collect())
}

/// Builds the graph of a whole model.
fn build(
    model: &PackedModel,
    weight_type: WeightType,
    options: &WriteOptions,
) -> Result<GraphBuilder, FormatError> {
    let spec = &model.spec;
    let named = |name: &str| Size::Named(name.into());
    let fixed = |size: usize| Size::Fixed(size as i64);
    let mut graph = GraphBuilder::default();
    let ids = graph.input("input_ids", Element::Int64, &[named("batch"), named("seq")]);
    let mask = graph.input("attention_mask", Element::Int64, &[named("batch"), named("total")]);
    let positions = graph.input("position_ids", Element::Int64, &[named("batch"), named("seq")]);
    let cache = |length| [named("batch"), fixed(spec.n_kv_heads), named(length), fixed(spec.head_dim())];

    let mut decoder = Decoder::new(model, weight_type, &mut graph, options, [&ids, &mask, &positions])?;
    let mut hidden = decoder.embed(&mut graph, &ids, &positions)?;
    for index in 0..spec.n_layers {
        let past = ["key", "value"].map(|part| {
            graph.input(&format!("past_key_values.{index}.{part}"), Element::Float, &cache("past"))
        });
        let present;
        (hidden, present) = decoder.block(&mut graph, index, &hidden, &past)?;
        for (part, value) in ["key", "value"].into_iter().zip(&present) {
            let name = format!("present.{index}.{part}");
            graph.output(&name, value, Element::Float, &cache("total"));
        }
    }
    let logits = decoder.head(&mut graph, &hidden, options)?;
    let dims = [named("batch"), named("seq"), fixed(spec.vocab_size)];
    graph.output("logits", &logits, Element::Float, &dims);
    Ok(graph)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Family, Tensor, model};
    use proto::{Graph, Initializer, Node};
    use std::collections::HashSet;

    const FAMILIES: [Family; 3] = [Family::Gpt2, Family::Llama, Family::Bitnet];

    fn options(weights: &str) -> WriteOptions {
        WriteOptions { weights: Some(weights.parse().unwrap()), embedding: None }
    }

    fn decoded(model: &PackedModel, options: &WriteOptions) -> (Model, Graph) {
        let file = Model::decode(encode(model, options).unwrap().as_slice()).unwrap();
        let graph = file.graph.clone().unwrap();
        (file, graph)
    }

    fn initializer<'a>(graph: &'a Graph, name: &str) -> &'a Initializer {
        graph.initializer.iter().find(|found| found.name == name).expect(name)
    }

    fn floats(initializer: &Initializer) -> Vec<f32> {
        let bytes = initializer.raw_data.chunks_exact(4);
        bytes.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    /// The node that uses a value.
    fn reader<'a>(graph: &'a Graph, value: &str) -> &'a Node {
        graph.node.iter().find(|node| node.input.iter().any(|input| input == value)).expect(value)
    }

    fn attribute(node: &Node, name: &str) -> i64 {
        node.attribute.iter().find(|found| found.name == name).expect(name).i
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        let mut values = vec![0.0; tensor.rows() * tensor.cols()];
        let rows = values.chunks_mut(tensor.cols()).enumerate();
        rows.for_each(|(row, values)| tensor.read_row(row, values));
        values
    }

    #[test]
    fn graphs_are_well_formed() {
        for family in FAMILIES {
            let model = model::random(family, Some(1));
            for weights in ["INT2", "MATMULNBITS2", "MATMULNBITS4", "F32", "F16"] {
                let (file, graph) = decoded(&model, &options(weights));
                let versions = (file.ir_version, file.opset_import[0].version);
                assert_eq!(versions, if weights == "INT2" { (13, 25) } else { (10, 21) });
                // Every value is defined once, before it is used.
                let mut known = HashSet::new();
                let inputs = graph.input.iter().map(|value| &value.name);
                for name in inputs.chain(graph.initializer.iter().map(|value| &value.name)) {
                    assert!(known.insert(name.as_str()), "{name}");
                }
                for node in &graph.node {
                    for input in &node.input {
                        assert!(known.contains(input.as_str()), "{input} of {}", node.name);
                    }
                    for output in &node.output {
                        assert!(known.insert(output), "{output}");
                    }
                    let known_domain = file.opset_import.iter().any(|opset| opset.domain == node.domain);
                    assert!(known_domain, "{}", node.domain);
                }
                for initializer in &graph.initializer {
                    let elements = initializer.dims.iter().product::<i64>() as usize;
                    let bits = match initializer.data_type {
                        1 => 32,
                        2 => 8,
                        7 => 64,
                        10 => 16,
                        26 => 2,
                        other => panic!("{other}"),
                    };
                    let bytes = (elements * bits).div_ceil(8);
                    assert_eq!(initializer.raw_data.len(), bytes, "{}", initializer.name);
                    assert!(graph.node.iter().any(|node| node.input.contains(&initializer.name)));
                }
                let names = |values: &[proto::ValueInfo]| {
                    values.iter().map(|value| value.name.clone()).collect::<Vec<_>>().join(" ")
                };
                assert_eq!(
                    names(&graph.input),
                    "input_ids attention_mask position_ids past_key_values.0.key past_key_values.0.value \
                     past_key_values.1.key past_key_values.1.value"
                );
                assert_eq!(
                    names(&graph.output),
                    "present.0.key present.0.value present.1.key present.1.value logits"
                );
            }
        }
    }

    #[test]
    fn int2_stores_codes_and_scales() {
        for scales in [1, 2] {
            let model = model::random(Family::Gpt2, Some(scales));
            let (_, graph) = decoded(&model, &options("INT2"));
            for (name, tensor) in model.tensors.iter().filter(|(name, _)| name.ends_with("ffn_down.weight")) {
                let stored = initializer(&graph, name);
                let node = reader(&graph, name);
                let [rows, cols] = [tensor.rows(), tensor.cols()];
                assert_eq!(stored.dims, [cols as i64, rows as i64]);
                let scale = initializer(&graph, &node.input[1]);
                let of_columns = floats(scale);
                let group = match scale.dims.len() {
                    1 => {
                        assert_eq!((scales, attribute(node, "axis")), (1, 1));
                        cols
                    }
                    _ => {
                        assert_eq!((scales, attribute(node, "axis")), (2, 0));
                        attribute(node, "block_size") as usize
                    }
                };
                let value = |row: usize, col: usize| {
                    let place = col * rows + row;
                    let code = stored.raw_data[place / 4] >> (2 * (place % 4)) & 3;
                    let code = [0.0, 1.0, f32::NAN, -1.0][code as usize];
                    code * of_columns[col / group * rows + row]
                };
                let found: Vec<f32> = (0..rows * cols).map(|i| value(i / cols, i % cols)).collect();
                assert_eq!(found, values(tensor), "{name}");
            }
        }
    }

    #[test]
    fn matmulnbits_blocks_store_codes_and_scales() {
        let model = model::random(Family::Llama, None);
        for bits in [2usize, 4] {
            let (_, graph) = decoded(&model, &options(&format!("MATMULNBITS{bits}")));
            for (name, tensor) in model.tensors.iter().filter(|(name, _)| name.starts_with("blk.0.attn_q")) {
                let (stored, node) = (initializer(&graph, name), reader(&graph, name));
                let block = attribute(node, "block_size") as usize;
                let [rows, cols] = [tensor.rows(), tensor.cols()];
                let blocks = cols.div_ceil(block);
                assert_eq!((attribute(node, "K"), attribute(node, "N")), (cols as i64, rows as i64));
                assert_eq!(stored.dims, [rows, blocks, block * bits / 8].map(|dim| dim as i64));
                let scales = floats(initializer(&graph, &node.input[2]));
                let value = |row: usize, col: usize| {
                    let place = row * blocks * block + col;
                    let code = stored.raw_data[place * bits / 8] >> (place * bits % 8) & ((1 << bits) - 1);
                    (f32::from(code) - (1 << (bits - 1)) as f32) * scales[row * blocks + col / block]
                };
                let found: Vec<f32> = (0..rows * cols).map(|i| value(i / cols, i % cols)).collect();
                assert_eq!(found, values(tensor), "{name}");
            }
        }
    }

    #[test]
    fn weights_that_do_not_fit_their_type_are_errors() {
        let model = model::random(Family::Llama, Some(2));
        let refused = |model, weights| encode(model, &options(weights)).unwrap_err().to_string();
        assert!(refused(&model, "MATMULNBITS4").contains("per_channel"));
        assert!(refused(&model, "TQ2_0").contains("INT2"));
        assert!(refused(&model, "BITNET").contains("INT2"));
        let mut float = model::random(Family::Llama, None);
        let matrix = float.tensors.get_mut("blk.1.ffn_up.weight").unwrap();
        *matrix = matrix.encode(Encoding::F32).unwrap();
        assert!(refused(&float, "INT2").contains("blk.1.ffn_up"));
        let tables = WriteOptions { weights: None, embedding: Some(Encoding::Q8_0) };
        assert!(matches!(encode(&model, &tables).unwrap_err().kind(), FormatError::RowLength { .. }));
    }

    #[test]
    fn graphs_above_the_file_limit_are_refused_before_they_are_filled() {
        let mut graph = GraphBuilder::default();
        let half = graph::LARGEST_FILE / 2 + 1;
        graph.initializer("first", Element::Uint8, &[half], half, Vec::new).unwrap();
        let error = graph.initializer("second", Element::Uint8, &[half], half, || unreachable!("too large"));
        assert!(matches!(error.unwrap_err(), FormatError::OnnxSize { .. }));
    }
}
