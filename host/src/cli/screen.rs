//! How an answer looks: what is for the user as it is, the rest under its channel's name, dimmed on a terminal.

use std::env;
use std::io::{self, Write};

use gpt_gamma::chat::{Channel, Event, Header};

/// Writes the messages that `shows` lets through, each on lines of its own.
pub struct Screen<W> {
    out: W,
    /// Whether `out` is a terminal: then channels are dimmed, and control characters, which could steer it, escaped.
    is_terminal: bool,
    /// Whether the terminal knows how to dim.
    dims: bool,
    shows: fn(&Header) -> bool,
    /// The message that has begun is shown, and how.
    open: Option<Look>,
    at_line_start: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Look {
    Plain,
    Dimmed,
}

const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

impl<W: Write> Screen<W> {
    /// Nothing was written to `out`'s current line.
    pub fn new(out: W, is_terminal: bool, shows: fn(&Header) -> bool) -> Self {
        let is_set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
        let dims = is_terminal && !is_set("NO_COLOR") && env::var_os("TERM").is_none_or(|term| term != "dumb");
        Self { out, is_terminal, dims, shows, open: None, at_line_start: true }
    }

    /// Shows what `event` brings.
    pub fn event(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::MessageStart(header) => {
                self.end_line()?;
                self.open = (self.shows)(header).then(|| look(header));
                if self.open.is_some() && !header.is_answer() {
                    let label = label(header);
                    self.text(&format!("[{label}] "), Look::Dimmed)?;
                }
            }
            Event::Text(bytes) => {
                if let Some(look) = self.open {
                    self.bytes(bytes, look)?;
                }
            }
            Event::MessageEnd => {
                self.end_line()?;
                self.open = None;
            }
            Event::Stop(_) => {}
        }
        self.out.flush()
    }

    /// Writes `bytes` as they are, but for what could steer a terminal.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes(bytes, Look::Plain)?;
        self.out.flush()
    }

    /// Ends the line, if anything stands on it.
    pub fn end_line(&mut self) -> io::Result<()> {
        if !self.at_line_start {
            self.out.write_all(b"\n")?;
            self.at_line_start = true;
        }
        self.out.flush()
    }

    fn bytes(&mut self, bytes: &[u8], look: Look) -> io::Result<()> {
        if self.is_terminal {
            return self.text(&steerless(&String::from_utf8_lossy(bytes)), look);
        }
        self.at_line_start = bytes.last().map_or(self.at_line_start, |&last| last == b'\n');
        self.out.write_all(bytes)
    }

    fn text(&mut self, text: &str, look: Look) -> io::Result<()> {
        self.at_line_start = if text.is_empty() { self.at_line_start } else { text.ends_with('\n') };
        if self.dims && look == Look::Dimmed {
            // Each piece alone, so that whatever ends the program leaves the terminal in order.
            return write!(self.out, "{DIM}{text}{RESET}");
        }
        self.out.write_all(text.as_bytes())
    }
}

fn look(header: &Header) -> Look {
    if header.channel == Some(Channel::Analysis) { Look::Dimmed } else { Look::Plain }
}

/// Channel and recipient, or who speaks if there is no channel.
fn label(header: &Header) -> String {
    let name = header.channel.as_ref().map_or(header.role.name(), Channel::name);
    let recipient = header.recipient.iter().map(|recipient| format!(" to {recipient}"));
    steerless(&[name.to_owned()].into_iter().chain(recipient).collect::<String>())
}

/// `text` with its control characters escaped, but for line ends and tabs.
fn steerless(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for letter in text.chars() {
        let steers = letter.is_control() && !matches!(letter, '\n' | '\t');
        if steers { escaped.extend(letter.escape_default()) } else { escaped.push(letter) }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpt_gamma::chat::Role;

    fn message(channel: Channel, recipient: Option<&str>, text: &str) -> [Event; 3] {
        let (role, channel, recipient) = (Role::Assistant, Some(channel), recipient.map(str::to_owned));
        let header = Header { role, channel, recipient, content_type: None, text: Vec::new() };
        [Event::MessageStart(header), Event::Text(text.as_bytes().to_vec()), Event::MessageEnd]
    }

    fn answer() -> Vec<Event> {
        let messages = [
            message(Channel::Analysis, None, "hm\x1b[2J"),
            message(Channel::Commentary, Some("functions.f"), "{}\n"),
            message(Channel::Final, None, "Hé\n\tllo"),
        ];
        messages.concat()
    }

    fn shown(mut screen: Screen<Vec<u8>>, dims: bool) -> String {
        screen.dims = dims;
        answer().iter().for_each(|event| screen.event(event).expect("a vector takes everything"));
        String::from_utf8(screen.out).expect("it was text")
    }

    #[test]
    fn a_pipe_gets_the_text_byte_for_byte_under_its_channel() {
        let expected = "[analysis] hm\x1b[2J\n[commentary to functions.f] {}\nHé\n\tllo\n";
        assert_eq!(shown(Screen::new(Vec::new(), false, |_| true), false), expected);
    }

    #[test]
    fn a_terminal_gets_analysis_dimmed_and_nothing_that_steers_it() {
        let expected = "\x1b[2m[analysis] \x1b[0m\x1b[2mhm\\u{1b}[2J\x1b[0m\n\
                        \x1b[2m[commentary to functions.f] \x1b[0m{}\nHé\n\tllo\n";
        assert_eq!(shown(Screen::new(Vec::new(), true, |_| true), true), expected);
    }

    #[test]
    fn what_is_not_to_be_shown_leaves_no_trace() {
        assert_eq!(shown(Screen::new(Vec::new(), false, Header::is_answer), false), "Hé\n\tllo\n");
    }
}
