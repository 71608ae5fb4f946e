//! [`Models`]: the served models, by name.

use crate::ServeError;
use std::{collections::HashSet, sync::Arc};
use ternary_format::{Tokenizer, chat::ChatTemplate};
use ternary_infer::Engine;

/// Maximum length of a name, in bytes.
const NAME_BYTES: usize = 256;

/// One or more models with unique names.
#[derive(Clone, Debug)]
pub struct Models(pub(crate) Vec<Model>);

/// A model with a tokenizer.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub name: String,
    pub engine: Arc<Engine>,
    /// `None`: the model was not trained on dialogues, and has text completions only.
    pub template: Option<Arc<ChatTemplate>>,
}

impl Models {
    /// Models with their names, in the order in which clients list them.
    ///
    /// # Errors
    /// `NoModels`, `SameName`, `Name`. `NoTokenizer`: a model has no tokenizer. `ChatTemplate`: the chat template of a model
    /// is invalid.
    pub fn new(engines: impl IntoIterator<Item = (String, Arc<Engine>)>) -> Result<Self, ServeError> {
        let mut names = HashSet::new();
        let mut models = Vec::new();
        for (name, engine) in engines {
            if name.is_empty() || name.len() > NAME_BYTES || name.chars().any(char::is_control) {
                return Err(ServeError::Name { name });
            }
            if !names.insert(name.clone()) {
                return Err(ServeError::SameName { name });
            }
            if engine.tokenizer().is_none() {
                return Err(ServeError::NoTokenizer { name });
            }
            let template = engine.chat_template().map(ChatTemplate::new).transpose();
            let template =
                template.map_err(|source| ServeError::ChatTemplate { name: name.clone(), source })?;
            models.push(Model { name, engine, template: template.map(Arc::new) });
        }
        if models.is_empty() { Err(ServeError::NoModels) } else { Ok(Self(models)) }
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|model| model.name.as_str())
    }
}

impl Model {
    pub fn tokenizer(&self) -> &Tokenizer {
        self.engine.tokenizer().expect("`Models::new` requires a tokenizer")
    }
}
