//! `quire show`: what a model is and how it is stored.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::checkpoint::{ModelSource, RopeSummary, Summary};

use super::{model_args, output, size};

/// Which model, and for whom.
#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// A GGUF file, or a directory with config.json, safetensors and tokenizer.json [default: the demo model inside the binary]
    #[arg(value_name = "MODEL")]
    path: Option<PathBuf>,

    /// The same, as other commands are told
    #[arg(long, short, env = "QUIRE_MODEL", value_name = "PATH")]
    model: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Opens the model, which reads no weights, and prints what it is.
pub(super) fn show(args: &ShowArgs) -> anyhow::Result<ExitCode> {
    let path = args.path.as_ref().or(args.model.as_ref());
    let source = path.cloned().map_or(ModelSource::Demo, ModelSource::Path);
    let checkpoint = model_args::open(&source)?;
    let summary = Summary::of(&checkpoint)?;
    let text = if args.json {
        serde_json::to_string_pretty(&summary)? + "\n"
    } else {
        text(&summary)
    };
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn text(summary: &Summary) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        text.extend([&format!("{name:<14}"), value.as_str(), "\n"]);
    };
    line("name", summary.name.clone());
    line(
        "family",
        format!(
            "{}, {} layers of width {}",
            summary.family, summary.layers, summary.hidden_size
        ),
    );
    line(
        "parameters",
        format!(
            "{} in {}, {} bits each",
            count(summary.parameters),
            size::show(summary.bytes),
            summary.bits_per_weight
        ),
    );
    for kind in &summary.tensors {
        let formats: Vec<String> = kind
            .formats
            .iter()
            .map(|(format, tensors)| format!("{format} × {tensors}"))
            .collect();
        line(
            &format!("  {}", kind.kind),
            format!(
                "{} at {} bits: {}",
                count(kind.parameters),
                kind.bits_per_weight,
                formats.join(", ")
            ),
        );
    }
    if let Some(experts) = summary.experts {
        line(
            "experts",
            format!(
                "{} in {} of {} layers, {} for a token",
                experts.count, experts.layers, summary.layers, experts.used
            ),
        );
    }
    line("context", format!("{} tokens", summary.context));
    let of = |layers: usize| {
        if layers == summary.layers {
            String::new()
        } else {
            format!(" in {layers} of {} layers", summary.layers)
        }
    };
    for (i, rope) in summary.rope.iter().enumerate() {
        let name = if i == 0 { "rope" } else { "" };
        line(name, show_rope(rope) + &of(rope.layers));
    }
    if summary.layers_without_rope > 0 {
        line("", format!("none{}", of(summary.layers_without_rope)));
    }
    let windowed: usize = summary.windows.iter().map(|window| window.layers).sum();
    let whole = summary.layers - windowed;
    if whole > 0 {
        let bytes = size::show(summary.kv_bytes_per_token);
        line("KV cache", format!("{bytes} a token{}", of(whole)));
    }
    for (i, window) in summary.windows.iter().enumerate() {
        let bytes = size::show(window.kv_bytes);
        let name = if i == 0 && whole == 0 { "KV cache" } else { "" };
        let tokens = window.tokens;
        line(
            name,
            format!(
                "{bytes} for a window of {tokens} tokens{}",
                of(window.layers)
            ),
        );
    }
    line(
        "tokenizer",
        format!("{}, {} tokens", summary.tokenizer, summary.vocabulary),
    );
    let template = if summary.chat_template { "yes" } else { "none" };
    line("chat template", template.to_owned());
    let license = summary.license.as_deref().unwrap_or("not stated");
    line("licence", license.to_owned());
    text
}

fn show_rope(rope: &RopeSummary) -> String {
    let mut parts = vec![format!("base {}", rope.theta)];
    if rope.rotated < rope.head_dim {
        parts.push(format!("{} of {} elements", rope.rotated, rope.head_dim));
    }
    let factor = rope.factor.map(|factor| format!(" × {factor}"));
    let context = rope.original_context;
    let context = context.map(|context| format!(" beyond {context} tokens"));
    if rope.scaling != "none" {
        let (factor, context) = (factor.unwrap_or_default(), context.unwrap_or_default());
        parts.push(format!("{}{factor}{context}", rope.scaling));
    }
    parts.join(", ")
}

/// Millions or billions, as models are named.
fn count(parameters: u64) -> String {
    match parameters as f64 {
        n if n >= 1e9 => format!("{:.2} B", n / 1e9),
        n if n >= 1e6 => format!("{:.2} M", n / 1e6),
        n if n >= 1e3 => format!("{:.1} K", n / 1e3),
        _ => parameters.to_string(),
    }
}
