//! Choosing tokens, and being told to stop.

use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use gpt_gamma::engine::Engine;
use gpt_gamma::sampler::{Sampled, Sampler, SamplerOptions};

use super::error::Error;
use super::model::Model;

/// Logits from which on it is faster to find the largest where they are than to copy them all.
const WORTH_IT: usize = 8192;

/// Chooses tokens: on the device where the likeliest is all that is wanted, else from the logits.
pub struct Chooser {
    pub sampler: Sampler,
    /// Whether the device's choice, the largest logit, will do unless it is banned.
    on_device: bool,
    /// Whether a few of the largest logits will do.
    by_likeliest: bool,
}

impl Chooser {
    /// `wants_logprobs`: whether the probability of what is chosen will be told.
    pub fn new(mut options: SamplerOptions, wants_logprobs: bool, model: &Model) -> Result<Self, Error> {
        // Ids that the model has and its tokenizer does not mean nothing, so they cannot be chosen.
        let (known, all) = (model.tokenizer.n_vocab(), model.spec().n_vocab);
        options.logit_bias.extend((known..all).map(|id| (id as u32, f32::NEG_INFINITY)));
        let is_greedy = options.temp == 0.0;
        let sampler = Sampler::new(options, all, model.tokenizer.eog_ids())?;
        let few_will_do = sampler.takes_likeliest() && !wants_logprobs;
        let (on_device, by_likeliest) = (few_will_do && is_greedy, few_will_do && all >= WORTH_IT);
        Ok(Self { sampler, on_device, by_likeliest })
    }

    /// Chooses what follows the tokens that `engine` has read.
    pub fn choose(&mut self, engine: &mut Engine, model: &Model) -> Result<Sampled, Error> {
        if self.on_device {
            let id = engine.greedy().map_err(|error| model.engine_error(error))?;
            if !self.sampler.bans(id) {
                // Nobody asked for the probability.
                return Ok(Sampled { id, logprob: f32::NAN, top: Vec::new() });
            }
        }
        if self.by_likeliest {
            let likeliest = engine.likeliest().map_err(|error| model.engine_error(error))?;
            if let Some(sampled) = self.sampler.sample_likeliest(&likeliest)? {
                return Ok(sampled);
            }
        }
        let logits = engine.logits().map_err(|error| model.engine_error(error))?;
        Ok(self.sampler.sample(&logits)?)
    }
}

/// What Ctrl-C does: nobody takes it, so it ends the process; or somebody does, and sees the first one raised.
#[derive(Clone)]
pub struct Interrupts(Arc<AtomicU8>);

const UNTAKEN: u8 = 0;
const TAKEN: u8 = 1;
const RAISED: u8 = 2;

impl Interrupts {
    /// Watches Ctrl-C from here on; once per process.
    pub fn watch() -> Result<Self, Error> {
        /// What shells report for a process that SIGINT killed.
        const KILLED_BY_SIGINT: i32 = 130;
        let state = Arc::new(AtomicU8::new(UNTAKEN));
        let handler = Arc::clone(&state);
        ctrlc::set_handler(move || {
            // A second one before the first is heeded ends the process, too.
            if handler.compare_exchange(TAKEN, RAISED, Ordering::Relaxed, Ordering::Relaxed).is_err() {
                process::exit(KILLED_BY_SIGINT);
            }
        })
        .map_err(Error::Interrupt)?;
        Ok(Self(state))
    }

    /// Takes the next Ctrl-C.
    pub fn take(&self) {
        self.0.store(TAKEN, Ordering::Relaxed);
    }

    /// Leaves Ctrl-C to end the process.
    pub fn leave(&self) {
        self.0.store(UNTAKEN, Ordering::Relaxed);
    }

    /// Whether Ctrl-C came since [`take`](Self::take).
    pub fn raised(&self) -> bool {
        self.0.load(Ordering::Relaxed) == RAISED
    }
}
