//! `duck train`: runs an experiment.

use crate::{Error, terminal};
use burn_ternary::train::TrainCommand;

pub fn run(command: &TrainCommand) -> Result<(), Error> {
    let result = command.run()?;
    terminal::print(result.summary())
}
