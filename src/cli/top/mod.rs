//! `tcmu-dif top`: the LUNs under load, asked of the daemon once a second.
//!
//! [`sample`] is one look at the daemon, [`rates`] what two of them say of the time between, [`screen`] how that is drawn. The daemon is asked
//! from a thread of its own: a LUN that is slow to answer does not hold up the keys.

mod rates;
mod sample;
mod screen;

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
    process::ExitCode,
    sync::mpsc,
    time::{Duration, Instant},
};

use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::{
    CliError, Done,
    args::{self, Cli},
    error, output,
};
use crate::control::{
    SOCKET,
    client::{Client, ClientError},
};
use sample::Sample;
use screen::Screen;

/// How often the daemon is asked.
const EVERY: Duration = Duration::from_secs(1);

/// How long the screen waits for a key before it looks whether there is something new.
const TICK: Duration = Duration::from_millis(100);

/// Runs `top`.
pub fn run(cli: &Cli, args: &args::Top) -> Done {
    let mut asked = Asked { socket: cli.run_dir.join(SOCKET), client: None, begun: Instant::now() };
    if args.once || args.json {
        return once(&mut asked, args.json);
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(CliError::new("top", "", "it draws on a terminal, and this is none")
            .then("tcmu-dif list --json, or for one sample of the rates: tcmu-dif top --json"));
    }
    // What is wrong from the start is said before the screen is taken.
    let first = asked.look().map_err(|e| failed(&e))?;
    let mut terminal = ratatui::try_init().map_err(|e| CliError::from("top", "terminal", &e))?;
    let shown = watch(&mut terminal, asked, first);
    ratatui::restore();
    shown.map_err(|e| CliError::from("top", "terminal", &e))?;
    Ok(ExitCode::SUCCESS)
}

fn failed(e: &ClientError) -> CliError {
    error::from_client("top", "", e)
}

/// The daemon, connected to again when it was away.
struct Asked {
    socket: PathBuf,
    client: Option<Client>,
    begun: Instant,
}

impl Asked {
    fn look(&mut self) -> Result<Sample, ClientError> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => Client::connect(&self.socket)?,
        };
        let sample = Sample::take(&mut client, &self.socket, || self.begun.elapsed())?;
        self.client = Some(client);
        Ok(sample)
    }
}

/// Two looks, and what was between them.
fn once(asked: &mut Asked, json: bool) -> Done {
    let before = asked.look().map_err(|e| failed(&e))?;
    std::thread::sleep(EVERY);
    let view = rates::view(Some(&before), asked.look().map_err(|e| failed(&e))?);
    if json { output::json(&view) } else { output::print(&screen::text(&view)) }
}

fn watch(terminal: &mut ratatui::DefaultTerminal, asked: Asked, first: Sample) -> io::Result<()> {
    let (send, receive) = mpsc::channel();
    let Asked { socket, begun, .. } = asked;
    let ask = move || {
        // A connection stays with its thread.
        let mut asked = Asked { socket, client: None, begun };
        let mut next = Instant::now() + EVERY;
        loop {
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
            next = Instant::now() + EVERY;
            if send.send(asked.look()).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new().name("top".to_owned()).spawn(ask)?;
    let mut screen = Screen::of(first);
    loop {
        terminal.draw(|frame| screen.draw(frame))?;
        if event::poll(TICK)?
            && let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
        {
            match key {
                KeyEvent { code: KeyCode::Char('q') | KeyCode::Esc, .. } => return Ok(()),
                KeyEvent { code: KeyCode::Char('c'), modifiers: KeyModifiers::CONTROL, .. } => return Ok(()),
                KeyEvent { code: KeyCode::Down, .. } => screen.scroll(1),
                KeyEvent { code: KeyCode::Up, .. } => screen.scroll(-1),
                _ => {}
            }
        }
        for look in receive.try_iter() {
            screen.take(look);
        }
    }
}
