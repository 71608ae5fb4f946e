//! [`GraphBuilder`]: builds an ONNX graph node by node.

use super::proto::{
    Attribute, Dimension, Graph, Initializer, Node, Shape, Size, TensorType, Type, ValueInfo,
};
use crate::FormatError;
use std::collections::HashMap;

/// Element types, by the numbers of ONNX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    Float = 1,
    Uint8 = 2,
    Int64 = 7,
    Bool = 9,
    Float16 = 10,
    Int2 = 26,
}

/// Limit of a protobuf message, and so of an ONNX file.
pub(super) const LARGEST_FILE: usize = i32::MAX as usize;

/// Name of a value in the graph: an input, an initializer or the output of a node.
pub(super) type Value = String;

/// Builds a graph. Values are named after the part of the model that computes them.
#[derive(Default)]
pub(super) struct GraphBuilder {
    graph: Graph,
    /// Part of the model that is being built, such as `blk.0.attn_q`.
    pub scope: String,
    /// Number of uses of each name.
    names: HashMap<String, usize>,
    bytes: usize,
}

impl GraphBuilder {
    /// Adds a node of a standard ONNX operator with one output.
    pub fn op(&mut self, op: &str, inputs: &[&Value], attributes: &[Attribute]) -> Value {
        self.node("", op, inputs, attributes, 1).remove(0)
    }

    /// Adds a node with `outputs` outputs.
    pub fn node(
        &mut self,
        domain: &str,
        op: &str,
        inputs: &[&Value],
        attributes: &[Attribute],
        outputs: usize,
    ) -> Vec<Value> {
        let name = self.unique(format!("{}/{op}", self.scope));
        let output: Vec<Value> = match outputs {
            1 => vec![name.clone()],
            _ => (0..outputs).map(|place| format!("{name}:{place}")).collect(),
        };
        self.graph.node.push(Node {
            input: inputs.iter().map(|input| input.to_string()).collect(),
            output: output.clone(),
            name,
            op_type: op.into(),
            attribute: attributes.to_vec(),
            domain: domain.into(),
        });
        output
    }

    fn unique(&mut self, name: String) -> String {
        let times = self.names.entry(name.clone()).or_default();
        *times += 1;
        if *times == 1 { name } else { format!("{name}.{times}") }
    }

    /// Adds a constant tensor of `length` bytes. `fill` is called if the file can still store it.
    ///
    /// # Errors
    /// `OnnxSize`: the file would be too large.
    pub fn initializer(
        &mut self,
        name: &str,
        element: Element,
        dims: &[usize],
        length: usize,
        fill: impl FnOnce() -> Vec<u8>,
    ) -> Result<Value, FormatError> {
        self.bytes = self.bytes.saturating_add(length);
        if self.bytes > LARGEST_FILE {
            return Err(FormatError::OnnxSize { limit: LARGEST_FILE });
        }
        let raw_data = fill();
        let dims = dims.iter().map(|&dim| dim as i64).collect();
        self.graph.initializer.push(Initializer {
            dims,
            data_type: element as i32,
            name: name.into(),
            raw_data,
        });
        Ok(name.into())
    }

    /// A constant list of integers, such as a shape. Equal lists are stored once.
    pub fn ints(&mut self, values: &[i64]) -> Value {
        let list: Vec<String> = values.iter().map(i64::to_string).collect();
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.constant(format!("[{}]", list.join(",")), Element::Int64, vec![values.len() as i64], bytes)
    }

    /// A constant integer scalar.
    pub fn int(&mut self, value: i64) -> Value {
        self.constant(format!("{value}"), Element::Int64, vec![], value.to_le_bytes().into())
    }

    /// A constant float scalar.
    pub fn float(&mut self, value: f32) -> Value {
        self.constant(format!("{value:e}"), Element::Float, vec![], value.to_le_bytes().into())
    }

    fn constant(&mut self, name: String, element: Element, dims: Vec<i64>, raw_data: Vec<u8>) -> Value {
        if self.names.insert(name.clone(), 1).is_none() {
            let data_type = element as i32;
            self.graph.initializer.push(Initializer { dims, data_type, name: name.clone(), raw_data });
        }
        name
    }

    pub fn input(&mut self, name: &str, element: Element, dims: &[Size]) -> Value {
        self.graph.input.push(value_info(name, element, dims));
        name.into()
    }

    /// Makes `value` the output `name` of the model.
    pub fn output(&mut self, name: &str, value: &Value, element: Element, dims: &[Size]) {
        self.graph.node.push(Node {
            input: vec![value.clone()],
            output: vec![name.into()],
            name: format!("{name}/Identity"),
            op_type: "Identity".into(),
            ..Node::default()
        });
        self.graph.output.push(value_info(name, element, dims));
    }

    pub fn build(self, name: &str) -> Graph {
        Graph { name: name.into(), ..self.graph }
    }
}

fn value_info(name: &str, element: Element, dims: &[Size]) -> ValueInfo {
    let dim = dims.iter().map(|size| Dimension { size: Some(size.clone()) }).collect();
    let tensor = TensorType { data_type: element as i32, shape: Some(Shape { dim }) };
    ValueInfo { name: name.into(), kind: Some(Type { tensor: Some(tensor) }) }
}

/// An integer attribute.
pub(super) fn int(name: &str, value: usize) -> Attribute {
    signed(name, value as i64)
}

/// An integer attribute that may be negative, such as an axis counted from the end.
pub(super) fn signed(name: &str, i: i64) -> Attribute {
    Attribute { name: name.into(), i, kind: 2, ..Attribute::default() }
}

/// A float attribute.
pub(super) fn float(name: &str, f: f32) -> Attribute {
    Attribute { name: name.into(), f, kind: 1, ..Attribute::default() }
}

/// A string attribute.
pub(super) fn text(name: &str, s: &str) -> Attribute {
    Attribute { name: name.into(), s: s.into(), kind: 3, ..Attribute::default() }
}

/// An attribute that is a list of integers.
pub(super) fn ints(name: &str, ints: &[i64]) -> Attribute {
    Attribute { name: name.into(), ints: ints.into(), kind: 7, ..Attribute::default() }
}
