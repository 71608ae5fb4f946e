//! Loads the teacher that an experiment names: a run folder, a model file or cached logits.

use super::TrainError;
use super::identity::{hex, model_digest};
use super::run_folder::packed_model;
use crate::data::tokens::TokenFile;
use crate::nn::DuckConfig;
use crate::train::distill::{
    DistillConfig, Teacher, TeacherError,
    cached_logits::{CachedLogits, MAGIC},
};
use burn::tensor::Device;
use memmap2::Mmap;
use std::{io::Read, path::Path};
use ternary_format::{PackedModel, Tokenizer, disk};

/// The teacher of an experiment, read, and not yet a model on a device.
pub(super) enum TeacherSource {
    Model(Box<PackedModel>),
    Logits(CachedLogits),
}

impl TeacherSource {
    /// Reads `distill.teacher`; `None` where the experiment names none.
    ///
    /// # Errors
    /// Those of [`packed_model`]. `Read`, `Experiment`: cached logits that cannot be read, or that are damaged.
    pub fn open(config: &DistillConfig) -> Result<Option<Self>, TrainError> {
        if config.teacher.is_empty() {
            return Ok(None);
        }
        let path = Path::new(&config.teacher);
        Ok(Some(match has_cached_logits(path) {
            true => Self::Logits(open_logits(path, config)?),
            false => Self::Model(Box::new(packed_model(path)?)),
        }))
    }

    /// Warnings of the reader of a model file.
    pub fn warnings(&self) -> &[String] {
        match self {
            Self::Model(model) => &model.warnings,
            Self::Logits(_) => &[],
        }
    }

    /// Bytes of memory that a model takes in f32; cached logits stay on the disk.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Model(model) => {
                let weights = model.tensors.values().map(|tensor| tensor.rows() * tensor.cols());
                (size_of::<f32>() * weights.sum::<usize>()) as u64
            }
            Self::Logits(_) => 0,
        }
    }

    /// SHA-256 of the contents.
    pub fn digest(&self) -> String {
        match self {
            Self::Model(model) => model_digest(model),
            Self::Logits(logits) => hex(logits.digest()),
        }
    }

    /// The teacher for a student that is trained on `text`, on `device`.
    ///
    /// # Errors
    /// `Experiment`: a teacher that does not fit the student or its text; `Import`, `MemoryTooSmall`: a model that cannot be made.
    pub fn load(
        self,
        config: &DistillConfig,
        tokenizer: &Tokenizer,
        text: &TokenFile,
        student: &DuckConfig,
        device: &Device,
    ) -> Result<Teacher, TrainError> {
        let teacher = match self {
            Self::Logits(logits) => Teacher::from_logits(logits, config, text, student),
            Self::Model(packed) => Teacher::from_model(&packed, config, tokenizer, student, device),
        };
        teacher.map_err(|error| unfit(error, config))
    }
}

/// The setting that names the teacher, for errors.
pub(super) fn origin(config: &DistillConfig) -> String {
    format!("distill.teacher = \"{}\"", config.teacher)
}

/// The error of a run whose teacher does not fit.
pub(super) fn unfit(error: TeacherError, config: &DistillConfig) -> TrainError {
    match error {
        TeacherError::Mismatch(message) => TrainError::Experiment { origin: origin(config), message },
        TeacherError::Memory(error) => error.into(),
        TeacherError::Model(error) => error.into(),
    }
}

/// Whether the file at `path` begins as cached logits do.
fn has_cached_logits(path: &Path) -> bool {
    let mut magic = [0; MAGIC.len()];
    let read = disk::open(path).and_then(|mut file| file.read_exact(&mut magic));
    read.is_ok() && magic == MAGIC
}

fn open_logits(path: &Path, config: &DistillConfig) -> Result<CachedLogits, TrainError> {
    let at_path = |source| TrainError::Read { path: path.into(), source };
    let file = disk::open(path).map_err(at_path)?;
    // SAFETY: the map is only read, as bytes, and the file is only ever replaced by a rename, as a token file is.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(&file) }.map_err(at_path)?;
    CachedLogits::from_map(map).ok_or_else(|| TrainError::Experiment {
        origin: origin(config),
        message: "the cached teacher logits are damaged; `duck distill-logits` writes them again".into(),
    })
}
