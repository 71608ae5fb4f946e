//! `duck completions` and `duck man`: shell completions and manual pages.

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

/// Print shell completions.
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

/// Write man pages into a folder.
#[derive(clap::Args)]
#[command(after_help = MAN)]
pub struct Man {
    /// Folder, which is created if it is missing
    dir: PathBuf,
    /// Replace existing pages
    #[arg(long)]
    overwrite: bool,
}

impl Man {
    pub fn run(self) -> Result<(), Error> {
        let Self { dir, overwrite } = self;
        let mut command = crate::Duck::command().disable_help_subcommand(true);
        command.build();
        let pages = std::iter::once(&command).chain(command.get_subcommands());
        let pages = pages.map(|command| clap_mangen::Man::new(command.clone())).collect::<Vec<_>>();
        fs::create_dir_all(&dir).map_err(|source| Error::Write { path: dir.clone(), source })?;
        // Checked first, so that all pages are written or none.
        for page in &pages {
            terminal::expect_free(&dir.join(page.get_filename()), overwrite)?;
        }
        for page in &pages {
            let mut text = Vec::new();
            page.render(&mut text).expect("writing to memory never fails");
            terminal::write_file(&dir.join(page.get_filename()), &text, overwrite)?;
        }
        Ok(())
    }
}
