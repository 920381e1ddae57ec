//! [`Requests`]: what a load asks for, request by request: random words, a dataset's prompts, or a trace's lengths.

use super::ask::{Ask, Message, Prompt, Sampling};
use super::dataset::Entry;
use super::lengths::Lengths;
use super::prompt::Prompts;
use super::trace::Arrival;
use crate::random::Random;

/// Makes the requests of a load; equal ones for equal seeds.
#[derive(Debug, Clone)]
pub struct Requests {
    /// The words.
    pub prompts: Prompts,
    /// Of prompts.
    pub prompt_tokens: Lengths,
    /// Of answers.
    pub max_tokens: Lengths,
    /// Prompts that people wrote, taken in turn; empty: random words.
    pub dataset: Vec<Entry>,
    /// Lengths that were seen; empty: drawn.
    pub trace: Vec<Arrival>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Messages a user sends in one conversation, each when the last is answered.
    pub turns: u32,
}

/// Streams of chance beside those of the prompts' words.
const LENGTHS: u64 = 0x1e49_75a1;
const TURNS: u64 = 0x7042_0115;

impl Requests {
    /// The first request of the `n`th conversation: where there is one turn, the `n`th request.
    pub fn nth(&self, n: u64) -> Ask {
        let (prompt_tokens, max_tokens) = self.lengths(n);
        let chat = self.turns > 1;
        match taken(&self.dataset, n) {
            Some(entry) => {
                let max_tokens = entry.max_tokens.unwrap_or(max_tokens);
                self.ask(entry.prompt.clone(), max_tokens, chat)
            }
            None => self.ask(self.prompts.nth(n, prompt_tokens), max_tokens, chat),
        }
    }

    /// The `n`th request to warm a server up: random words also where there is a dataset, all of which may be measured. Sent as its prompts are.
    pub fn warmup(&self, n: u64) -> Ask {
        let (prompt_tokens, max_tokens) = self.lengths(n);
        let first = self.dataset.first().map(|entry| &entry.prompt);
        let chat = self.turns > 1 || matches!(first, Some(Prompt::Chat(_)));
        self.ask(self.prompts.nth(n, prompt_tokens), max_tokens, chat)
    }

    /// Tokens of the `n`th prompt, and of its answer.
    fn lengths(&self, n: u64) -> (u32, u32) {
        let mut lengths = Random::nth(self.prompts.seed ^ LENGTHS, n);
        let drawn = (
            self.prompt_tokens.draw(&mut lengths),
            self.max_tokens.draw(&mut lengths),
        );
        taken(&self.trace, n).map_or(drawn, |seen| (seen.prompt_tokens, seen.max_tokens))
    }

    /// `chat`: a text is what a user says.
    fn ask(&self, prompt: Prompt, max_tokens: u32, chat: bool) -> Ask {
        Ask {
            prompt: match prompt {
                Prompt::Text(text) if chat => Prompt::Chat(vec![Message::user(text)]),
                prompt => prompt,
            },
            max_tokens,
            sampling: self.sampling,
        }
    }

    /// What the user of the `n`th conversation says after `answer` was given to `asked`, as turn `turn` (the first is 0).
    pub fn next(&self, n: u64, turn: u32, asked: Ask, answer: String) -> Ask {
        let mut random = Random::nth(
            self.prompts.seed ^ TURNS,
            n.wrapping_mul(1024) + u64::from(turn),
        );
        let tokens = self.prompt_tokens.draw(&mut random);
        let max_tokens = self.max_tokens.draw(&mut random);
        let mut messages = match asked.prompt {
            Prompt::Chat(messages) => messages,
            Prompt::Text(text) => vec![Message::user(text)],
            // Ids cannot be told apart into messages; `--turns` refuses them.
            Prompt::Ids(_) => Vec::new(),
        };
        messages.push(Message {
            role: "assistant".to_owned(),
            content: answer,
        });
        messages.push(Message::user(Prompts::words(&mut random, tokens)));
        Ask {
            prompt: Prompt::Chat(messages),
            max_tokens,
            sampling: self.sampling,
        }
    }
}

/// The `n`th of them, taken in turn; `None`: there are none.
fn taken<T>(from: &[T], n: u64) -> Option<&T> {
    let at = n.checked_rem(from.len() as u64)?;
    from.get(at as usize)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn requests() -> Requests {
        Requests {
            prompts: Prompts {
                seed: 4,
                shared: 0,
                vocab: None,
            },
            prompt_tokens: Lengths::Uniform(5, 50),
            max_tokens: Lengths::Uniform(1, 9),
            dataset: Vec::new(),
            trace: Vec::new(),
            sampling: Sampling::GREEDY,
            turns: 1,
        }
    }

    fn words(prompt: &Prompt) -> usize {
        match prompt {
            Prompt::Text(text) => text.split(' ').count(),
            other => panic!("{other:?} is no text"),
        }
    }

    #[test]
    fn lengths_are_drawn_and_repeat() {
        let requests = requests();
        let of = |n| {
            let ask = requests.nth(n);
            (words(&ask.prompt), ask.max_tokens)
        };
        let lengths: Vec<_> = (0..200).map(of).collect();
        assert!(
            lengths
                .iter()
                .all(|(p, m)| (5..=50).contains(p) && (1..=9).contains(m))
        );
        assert!(lengths.iter().any(|l| *l != lengths[0]));
        assert_eq!(requests.nth(7), requests.nth(7));
    }

    #[test]
    fn a_trace_says_how_long_and_a_dataset_says_what() {
        let trace = vec![
            Arrival {
                at: Duration::ZERO,
                prompt_tokens: 3,
                max_tokens: 30,
            };
            2
        ];
        let traced = Requests {
            trace,
            ..requests()
        };
        let ask = traced.nth(1);
        assert_eq!((words(&ask.prompt), ask.max_tokens), (3, 30));
        let said = Requests {
            dataset: vec![Entry {
                prompt: Prompt::Text("Hello there".to_owned()),
                max_tokens: Some(77),
            }],
            ..requests()
        };
        let ask = said.nth(5);
        assert_eq!(
            (ask.prompt, ask.max_tokens),
            (Prompt::Text("Hello there".to_owned()), 77)
        );
    }

    #[test]
    fn a_conversation_grows_by_the_answer_and_the_next_message() {
        let chats = Requests {
            turns: 3,
            ..requests()
        };
        let first = chats.nth(2);
        let second = chats.next(2, 1, first.clone(), "An answer.".to_owned());
        let (Prompt::Chat(first), Prompt::Chat(second)) = (first.prompt, second.prompt) else {
            panic!("conversations were asked for");
        };
        assert_eq!(first.len(), 1);
        assert_eq!(second[..1], first);
        let roles: Vec<&str> = second.iter().map(|m| m.role.as_str()).collect();
        assert_eq!(roles, ["user", "assistant", "user"]);
        assert_eq!(second[1].content, "An answer.");
        assert_ne!(second[2].content, second[0].content);
    }

    #[test]
    fn a_server_is_warmed_up_with_nothing_that_is_measured() {
        let hello = vec![Message::user("Hello there".to_owned())];
        for prompt in [
            Prompt::Text("Hello there".to_owned()),
            Prompt::Chat(hello.clone()),
        ] {
            let entry = Entry {
                prompt: prompt.clone(),
                max_tokens: None,
            };
            let said = Requests {
                dataset: vec![entry],
                ..requests()
            };
            let warm = said.warmup(3).prompt;
            assert_ne!(warm, prompt);
            assert_eq!(
                matches!(warm, Prompt::Chat(_)),
                matches!(prompt, Prompt::Chat(_))
            );
        }
    }
}
