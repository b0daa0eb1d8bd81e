//! `gamma chat`: messages in, answers out, in a terminal or through a pipe.

use std::io::{self, BufRead, IsTerminal, StdinLock, StdoutLock, Write, stderr, stdin, stdout};

use clap::ValueEnum;
use gpt_gamma::chat::{Channel, Header, Message, Reasoning, Role};
use gpt_gamma::tokenizer::StreamDecoder;
use rustyline::error::ReadlineError;
use rustyline::{Config, DefaultEditor};

use super::args::{Chat, Effort};
use super::chooser::{Chooser, Interrupts};
use super::dialogue::{Answer, Conversation, Dialogue, Format, Reason, Step};
use super::error::{Error, escape, one_line};
use super::model::{self, Model};
use super::screen::Screen;
use super::{note, session};

const HELP: &str = "\
/reset             forget the conversation
/system [TEXT]     instruct the model; without TEXT, no more
/reasoning EFFORT  have it think: low, medium or high
/help              print this
/quit              end the chat, as Ctrl-D does
Ctrl-C ends an answer. A space in front makes a message of a line that begins with /.";

/// Runs the command.
pub fn run(args: &Chat) -> Result<(), Error> {
    let model = Model::open(&args.model, &args.engine, &args.device)?;
    let format = Format::of(&model)?;
    let sampling = args.sampling.options(0);
    // What is wrong with it is told before the model is loaded.
    Chooser::new(sampling.clone(), false, &model)?;
    let interrupts = Interrupts::watch()?;
    let engine = session::load(&model, &args.device, args.stats)?;
    let n_predict = args.n_predict.0;
    let dialogue = Dialogue::new(&model, &format, engine, interrupts.clone(), n_predict);
    let mut chat = Session {
        args,
        model: &model,
        format: &format,
        dialogue: dialogue.sampling(sampling, false),
        conversation: Conversation {
            system: args.instructions.system.clone(),
            reasoning: args.instructions.reasoning.into(),
            messages: Vec::new(),
        },
    };
    let mut input = Lines::open()?;
    if let Lines::Terminal { .. } = input {
        note(&format!("{}, context of {} tokens; /help lists commands", model::name(&model.file), model.options.n_ctx));
    }
    while let Some(line) = input.next()? {
        match Command::of(&line) {
            Command::Nothing => {}
            Command::Quit => break,
            Command::Say(text) => {
                chat.say(text)?;
                interrupts.leave();
            }
            command => chat.change(command),
        }
    }
    Ok(())
}

/// What a line means.
#[derive(Debug, PartialEq)]
enum Command<'a> {
    Nothing,
    Say(&'a str),
    Reset,
    System(&'a str),
    Reasoning(Reasoning),
    Help,
    Quit,
    /// Why the line is none of these.
    Wrong(String),
}

impl<'a> Command<'a> {
    fn of(line: &'a str) -> Self {
        if line.trim().is_empty() {
            return Self::Nothing;
        }
        if !line.starts_with('/') {
            return Self::Say(line);
        }
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match name {
            "/system" => Self::System(rest),
            "/reasoning" => match Effort::from_str(rest, false) {
                Ok(effort) => Self::Reasoning(effort.into()),
                Err(_) => Self::Wrong(format!("/reasoning: '{rest}' is no effort; expected low, medium or high")),
            },
            "/reset" | "/help" | "/quit" if !rest.is_empty() => {
                Self::Wrong(format!("{name}: takes nothing, found '{rest}'"))
            }
            "/reset" => Self::Reset,
            "/help" => Self::Help,
            "/quit" => Self::Quit,
            _ => Self::Wrong(format!("{name}: no such command; /help lists them, and a space in front makes it text")),
        }
    }
}

/// A chat under way.
struct Session<'m> {
    args: &'m Chat,
    model: &'m Model,
    format: &'m Format<'m>,
    dialogue: Dialogue<'m>,
    conversation: Conversation,
}

impl Session<'_> {
    /// Does what changes the conversation from outside.
    fn change(&mut self, command: Command) {
        match command {
            Command::Reset => {
                self.conversation.messages.clear();
                note("the conversation is forgotten");
            }
            Command::System(text) => {
                self.conversation.system = (!text.is_empty()).then(|| text.to_owned());
                note(if text.is_empty() { "no instructions from here on" } else { "these are the instructions now" });
            }
            Command::Reasoning(reasoning) => {
                self.conversation.reasoning = reasoning;
                note(&format!("reasoning effort is {} now", reasoning.name()));
            }
            Command::Help => {
                let _ = writeln!(stderr(), "{HELP}");
            }
            Command::Wrong(why) => note(&escape(&why)),
            Command::Nothing | Command::Say(_) | Command::Quit => {}
        }
    }

    /// Has `text` answered. What goes wrong with this message only is told, and the message taken back.
    fn say(&mut self, text: &str) -> Result<(), Error> {
        self.conversation.say(text.to_owned());
        let prompt = match self.format.render(self.model, &self.conversation) {
            Ok(prompt) => prompt,
            Err(error) => {
                self.conversation.messages.pop();
                note(&one_line(&error));
                return Ok(());
            }
        };
        if prompt.len() > self.model.options.n_ctx {
            self.conversation.messages.pop();
            let then = format!("the conversation would have {}; /reset starts a new one", prompt.len());
            note(&self.model.context_full(&then));
            return Ok(());
        }
        let answer = self.answer(&prompt)?;
        self.dialogue.advance_seed();
        self.tell(&answer);
        let was_silent = answer.messages.is_empty();
        self.conversation.messages.extend(answer.messages);
        // Templates want both sides to take turns.
        if was_silent && matches!(self.format, Format::Template(_)) {
            self.conversation.messages.push(Message::assistant(Channel::Final, ""));
        }
        Ok(())
    }

    /// Lets the model answer, and shows that.
    fn answer(&mut self, prompt: &[u32]) -> Result<Answer, Error> {
        let shows: fn(&Header) -> bool = match self.args.hide_analysis {
            true => |header| header.channel != Some(Channel::Analysis),
            false => |_| true,
        };
        let mut screen: Screen<StdoutLock> = Screen::new(stdout().lock(), stdout().is_terminal(), shows);
        let tokenizer = &self.model.tokenizer;
        let mut decoder = StreamDecoder::new(tokenizer);
        let is_raw = self.args.raw;
        let answer = self.dialogue.answer(prompt, &mut |step: &Step| {
            if is_raw {
                let Some(chosen) = step.chosen else { return Ok(()) };
                let file = || model::name(&self.model.file);
                let bytes = decoder.push(chosen.id).map_err(|source| Error::Tokenizer { file: file(), source })?;
                return screen.raw(bytes).map_err(Error::Output);
            }
            step.events.iter().try_for_each(|event| screen.event(event)).map_err(Error::Output)
        })?;
        if is_raw {
            screen.raw(&decoder.finish()).map_err(Error::Output)?;
        }
        screen.end_line().map_err(Error::Output)?;
        Ok(answer)
    }

    /// Says what the answer itself does not.
    fn tell(&self, answer: &Answer) {
        match answer.reason {
            Reason::Context => {
                let then = format!("the answer stopped after {} tokens; /reset starts a new one", answer.n_generated);
                note(&self.model.context_full(&then));
            }
            Reason::Length => note(&format!("the answer stopped after -n {} tokens", answer.n_generated)),
            Reason::Interrupt => note("the answer was interrupted"),
            Reason::Stop { .. } | Reason::ReversePrompt => {}
        }
        let is_call = |message: &&Message| message.role == Role::Assistant && message.recipient.is_some();
        if let Some(recipient) = answer.messages.last().filter(is_call).and_then(|message| message.recipient.as_ref()) {
            note(&escape(&format!("the model calls {recipient}, and there are no functions here")));
        }
        if self.args.stats {
            answer.print();
        }
    }
}

/// Where messages come from, a line each.
enum Lines {
    /// A terminal, with editing and history.
    Terminal {
        editor: Box<DefaultEditor>,
    },
    Plain(StdinLock<'static>),
}

impl Lines {
    /// The terminal if there is one on both sides, else standard input.
    fn open() -> Result<Self, Error> {
        if !stdin().is_terminal() || !stdout().is_terminal() {
            return Ok(Self::Plain(stdin().lock()));
        }
        let config = Config::builder().auto_add_history(true).build();
        let editor = DefaultEditor::with_config(config).map_err(Error::Terminal)?;
        Ok(Self::Terminal { editor: Box::new(editor) })
    }

    /// The next line without its end, or none if there are no more.
    fn next(&mut self) -> Result<Option<String>, Error> {
        match self {
            Self::Plain(input) => plain(input),
            Self::Terminal { editor } => {
                let mut was_interrupted = false;
                loop {
                    match editor.readline("> ") {
                        Ok(line) => return Ok(Some(line)),
                        Err(ReadlineError::Eof) => return Ok(None),
                        Err(ReadlineError::Interrupted) if was_interrupted => return Ok(None),
                        Err(ReadlineError::Interrupted) => {
                            was_interrupted = true;
                            note("Ctrl-C again ends the chat, as Ctrl-D and /quit do");
                        }
                        Err(error) => return Err(Error::Terminal(error)),
                    }
                }
            }
        }
    }
}

/// The next line of `input` that is text.
fn plain(input: &mut impl BufRead) -> Result<Option<String>, Error> {
    loop {
        let mut bytes = Vec::new();
        match input.read_until(b'\n', &mut bytes) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Input(error)),
        }
        let line = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        match str::from_utf8(line) {
            Ok(line) => return Ok(Some(line.to_owned())),
            Err(_) => note("message: is not UTF-8, so it was not sent"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_unless_they_begin_with_a_slash() {
        let cases = [
            ("", Command::Nothing),
            (" \t", Command::Nothing),
            ("Hi / there", Command::Say("Hi / there")),
            (" /reset", Command::Say(" /reset")),
            ("/reset", Command::Reset),
            ("/reset ", Command::Reset),
            ("/quit", Command::Quit),
            ("/help", Command::Help),
            ("/system", Command::System("")),
            ("/system  Be a pirate. ", Command::System("Be a pirate.")),
            ("/reasoning high", Command::Reasoning(Reasoning::High)),
        ];
        for (line, expected) in cases {
            assert_eq!(Command::of(line), expected, "{line:?}");
        }
        for line in ["/", "/rest", "/RESET", "/reasoning", "/reasoning hard", "/quit now", "/resetnow"] {
            assert!(matches!(Command::of(line), Command::Wrong(_)), "{line:?}");
        }
    }
}
