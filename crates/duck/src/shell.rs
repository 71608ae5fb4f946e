//! `duck completions` and `duck man`: what shells and manuals want to know of this program.

use crate::{Error, terminal};
use clap::CommandFactory;
use clap_complete::Shell;
use std::{fs, path::PathBuf};

const COMPLETIONS: &str = "\
Examples:
  duck completions bash > ~/.local/share/bash-completion/completions/duck
  duck completions fish > ~/.config/fish/completions/duck.fish
  duck completions zsh > \"${fpath[1]}/_duck\"";

const MAN: &str = "\
Examples:
  duck man ~/.local/share/man/man1";

/// Print the completions of a shell.
#[derive(clap::Args)]
#[command(after_help = COMPLETIONS)]
pub struct Completions {
    shell: Shell,
}

impl Completions {
    pub fn run(self) -> Result<(), Error> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut crate::Duck::command(), "duck", &mut script);
        terminal::stream(&String::from_utf8_lossy(&script))
    }
}

/// Write manual pages into a folder.
#[derive(clap::Args)]
#[command(after_help = MAN)]
pub struct Man {
    /// Folder; made where it is missing
    dir: PathBuf,
}

impl Man {
    pub fn run(self) -> Result<(), Error> {
        let path = self.dir;
        let written =
            fs::create_dir_all(&path).and_then(|()| clap_mangen::generate_to(crate::Duck::command(), &path));
        written.map_err(|source| Error::Write { path, source })
    }
}
