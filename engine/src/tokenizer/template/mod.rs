//! Chat templates: a conversation to the text a model was trained to continue.
//!
//! In goes a model's Jinja source and a [`Conversation`], out comes the same text, byte for byte, that Python's jinja2 gives with
//! transformers' settings: [`python`] and [`methods`] add what minijinja lacks of Python, [`dialect`] adapts the source where adding does
//! not suffice, [`json`] is `json.dumps`.
//!
//! **Invariant:** a template comes from outside. Whatever it does ends, in a text or an error, within bounded memory ([`budget`]) and stack, and within as much
//! time as is charged for, by minijinja or by [`guards`]: not for what a slice skips, nor for slices of slices that no variable keeps.

mod budget;
mod chat_template;
mod dialect;
mod guards;
mod json;
mod methods;
mod python;

pub use chat_template::{ChatTemplate, Clock, Conversation, TemplateError};
