//! Progress on stderr: a bar on a terminal, and a line every few seconds elsewhere, as in a container or a log.

use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use std::cell::RefCell;
use std::fmt::Write;
use std::io::IsTerminal;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// True if only results, warnings and errors are wanted.
static QUIET: OnceLock<bool> = OnceLock::new();

/// Time between two lines if stderr is not a terminal.
const EVERY: Duration = Duration::from_secs(5);

/// Chooses for the whole process whether progress and tips are printed.
pub(super) fn set_quiet(quiet: bool) {
    let _ = QUIET.set(quiet);
}

/// True if progress and tips are not wanted.
pub(super) fn is_quiet() -> bool {
    QUIET.get().copied().unwrap_or(false)
}

/// The progress of one piece of work.
pub(super) struct Progress {
    /// The activity, such as "sampling".
    doing: &'static str,
    /// The plural of what is counted, such as "steps".
    unit: &'static str,
    view: View,
}

enum View {
    Bar(ProgressBar),
    Lines(RefCell<Lines>),
    Nothing,
}

struct Lines {
    total: u64,
    first: Option<(u64, Instant)>,
    last: Instant,
}

impl Progress {
    /// Begins a piece of work, whose total may be set later.
    pub(super) fn new(doing: &'static str, total: u64, unit: &'static str) -> Self {
        let view = match () {
            _ if is_quiet() => View::Nothing,
            _ if std::io::stderr().is_terminal() => {
                let bar = ProgressBar::new(total);
                let template = "{prefix} {bar:30} {counted} {rate} {eta} {msg}";
                if let Ok(style) = ProgressStyle::with_template(template) {
                    let counted = move |state: &ProgressState, out: &mut dyn Write| {
                        let _ = out.write_str(&counted(state.pos(), state.len().unwrap_or(0), unit));
                    };
                    let rate = move |state: &ProgressState, out: &mut dyn Write| {
                        let _ = out.write_str(&rate(state.per_sec(), unit));
                    };
                    bar.set_style(style.with_key("counted", counted).with_key("rate", rate));
                }
                bar.set_prefix(doing);
                View::Bar(bar)
            }
            _ => View::Lines(RefCell::new(Lines { total, first: None, last: Instant::now() })),
        };
        Progress { doing, unit, view }
    }

    /// Sets the total amount of work.
    pub(super) fn set_total(&self, total: u64) {
        match &self.view {
            View::Bar(bar) => bar.set_length(total),
            View::Lines(lines) => lines.borrow_mut().total = total,
            View::Nothing => {}
        }
    }

    /// Reports how much is done, with `more` as additional text. The amount in the first call counts as the starting
    /// point for the rate.
    pub(super) fn set(&self, done: u64, more: &str) {
        match &self.view {
            View::Bar(bar) => {
                if bar.position() == 0 && done > 0 && bar.message().is_empty() {
                    bar.reset_eta();
                }
                bar.set_position(done);
                bar.set_message(more.to_string());
            }
            View::Lines(lines) => {
                let mut lines = lines.borrow_mut();
                let (begun, start) = *lines.first.get_or_insert((done, Instant::now()));
                if lines.last.elapsed() < EVERY {
                    return;
                }
                lines.last = Instant::now();
                let per_second = (done - begun.min(done)) as f64 / start.elapsed().as_secs_f64().max(1e-3);
                let left = match per_second > 0.0 {
                    true => format!(", {:.0} s left", lines.total.saturating_sub(done) as f64 / per_second),
                    false => String::new(),
                };
                let more = if more.is_empty() { String::new() } else { format!(", {more}") };
                let counted = counted(done, lines.total, self.unit);
                super::note(&format!("{} {counted}, {}{left}{more}", self.doing, rate(per_second, self.unit)));
            }
            View::Nothing => {}
        }
    }

    /// Calls a function that prints, while the bar is hidden.
    pub(super) fn suspend<R>(&self, print: impl FnOnce() -> R) -> R {
        match &self.view {
            View::Bar(bar) => bar.suspend(print),
            _ => print(),
        }
    }

    /// Ends the work and removes the bar.
    pub(super) fn finish(&self) {
        if let View::Bar(bar) = &self.view {
            bar.finish_and_clear();
        }
    }
}

/// The finished amount and the total; bytes are in MB.
fn counted(done: u64, total: u64, unit: &str) -> String {
    match unit {
        "bytes" => format!("{:.1}/{:.1} MB", done as f64 / 1e6, total as f64 / 1e6),
        _ => format!("{done}/{total} {unit}"),
    }
}

/// A rate. For steps and iterations it is in `it/s`, as in other programs.
fn rate(per_second: f64, unit: &str) -> String {
    match unit {
        "bytes" => format!("{:.1} MB/s", per_second / 1e6),
        "pictures" => format!("{per_second:.2} pictures/s"),
        _ => format!("{per_second:.2} it/s"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_have_units() {
        assert_eq!(super::counted(3, 25, "steps"), "3/25 steps");
        assert_eq!(super::counted(1_500_000, 3_000_000, "bytes"), "1.5/3.0 MB");
        assert_eq!(super::rate(2.345, "steps"), "2.35 it/s");
    }
}
