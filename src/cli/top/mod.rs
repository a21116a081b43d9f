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
    sync::mpsc::{self, TryRecvError},
    time::{Duration, Instant},
};

use crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::{
    CliError, Done,
    args::{self, Cli},
    error, output,
};
use crate::{
    control::{
        SOCKET,
        client::{Client, ClientError},
    },
    sys::signals::{Signal, Signals},
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
    // Before any thread is there.
    let shown = Signals::take().and_then(|end| on_terminal(|terminal| watch(terminal, &end, asked, first)));
    shown.map_err(|e| CliError::from("top", "terminal", &e))?;
    Ok(ExitCode::SUCCESS)
}

/// Gives the terminal back as it was, however it is left.
struct GiveBack;

impl Drop for GiveBack {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Shows something on the whole terminal. A panic, on whatever thread, gives it back before its message is printed.
fn on_terminal<T>(show: impl FnOnce(&mut ratatui::DefaultTerminal) -> io::Result<T>) -> io::Result<T> {
    let mut terminal = ratatui::try_init()?;
    let _give_back = GiveBack;
    show(&mut terminal)
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

/// Draws until somebody presses a key that ends it, or a signal comes that would.
fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    end: &Signals,
    asked: Asked,
    first: Sample,
) -> io::Result<()> {
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
        while let Some(signal) = end.take_next()? {
            if matches!(signal, Signal::Stop | Signal::Reload) {
                return Ok(());
            }
        }
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
        loop {
            match receive.try_recv() {
                Ok(look) => screen.take(look),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    return Err(io::Error::other("nobody asks the daemon any more"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says that the process below is to panic.
    const PANIC: &str = "TCMU_DIF_TEST_PANIC";

    /// Run on a terminal by the test below; to everybody else it does nothing.
    #[test]
    #[ignore = "the process that panics; the test beside it runs it"]
    fn panics_on_a_terminal() {
        if std::env::var_os(PANIC).is_none() {
            return;
        }
        on_terminal(|terminal| -> io::Result<()> {
            terminal.draw(|frame| frame.render_widget("drawn", frame.area()))?;
            panic!("for the test");
        })
        .unwrap();
    }

    #[test]
    fn a_panic_leaves_the_terminal_as_it_was_and_its_message_on_it() {
        let me = std::env::current_exe().unwrap();
        let line = format!(
            "stty rows 20 cols 100; before=$(stty -g); {} --ignored --exact --nocapture {}; \
             test \"$before\" = \"$(stty -g)\" && echo as before",
            me.display(),
            "cli::top::tests::panics_on_a_terminal"
        );
        let out = std::process::Command::new("script")
            .args(["--quiet", "--command", &line, "/dev/null"])
            .env("TERM", "xterm")
            .env(PANIC, "1")
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stdout);
        let at = |part: &str| said.rfind(part).unwrap_or_else(|| panic!("no {part:?}: {said:?}"));
        assert!(at("\x1b[?1049h") < at("drawn") && at("drawn") < at("\x1b[?1049l"), "{said:?}");
        assert!(at("\x1b[?1049l") < at("as before"), "{said:?}");
        // On the screen that stays.
        let first_out = said.find("\x1b[?1049l").unwrap();
        assert!(at("for the test") > first_out, "{said:?}");
    }
}
