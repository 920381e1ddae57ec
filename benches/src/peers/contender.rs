//! [`Contender`]: a server that can be started — ours, llama.cpp's, mistral.rs's, vLLM's — and how.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Serialize;

use super::program;

/// Whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Who {
    /// `quire serve`.
    Quire,
    /// The same with the checkpoint that vLLM reads: what of a ratio to vLLM is not the quantised file's.
    QuireSame,
    /// llama.cpp's `llama-server`.
    LlamaServer,
    /// `mistralrs serve`, or `mistralrs-server`, as it was called before 0.7.
    MistralRs,
    /// `python -m vllm.entrypoints.openai.api_server`.
    Vllm,
}

impl Who {
    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Quire => "quire",
            Self::QuireSame => "quire, vLLM's checkpoint",
            Self::LlamaServer => "llama-server",
            Self::MistralRs => "mistral.rs",
            Self::Vllm => "vLLM",
        }
    }

    /// Whether it is somebody else's.
    pub fn is_peer(self) -> bool {
        !matches!(self, Self::Quire | Self::QuireSame)
    }

    /// How many times its output tokens a second ours are to be.
    pub fn bar(self) -> Option<f64> {
        match self {
            // No bar was set for mistral.rs.
            Self::Quire | Self::QuireSame | Self::MistralRs => None,
            Self::LlamaServer => Some(3.0),
            Self::Vllm => Some(5.0),
        }
    }

    /// How long it may take from its start until it is ready.
    pub fn patience(self) -> Duration {
        match self {
            // It compiles as it starts.
            Self::Vllm => Duration::from_secs(900),
            _ => Duration::from_secs(300),
        }
    }
}

/// A server that is installed.
#[derive(Debug, Clone)]
pub struct Contender {
    /// Whose it is.
    pub who: Who,
    program: PathBuf,
    model: PathBuf,
    more: Vec<String>,
}

/// What every server is told.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Threads that compute.
    pub threads: usize,
    /// Requests at once.
    pub clients: u32,
    /// Tokens a request may need, prompt and answer.
    pub room: u32,
}

/// Where the servers are, as somebody named them.
#[derive(Debug, Clone, Copy)]
pub struct Places<'a> {
    /// The file that quire, llama.cpp and mistral.rs read.
    pub model: &'a Path,
    /// The same model as a directory, for vLLM.
    pub hf_model: Option<&'a Path>,
    /// Our binary; `None`: beside this one.
    pub quire: Option<&'a Path>,
    /// More for its command line.
    pub quire_args: &'a str,
    /// The directory of llama-server; `None`: the path.
    pub llama_bin: Option<&'a Path>,
    /// mistral.rs's program or its directory; `None`: the path.
    pub mistralrs_bin: Option<&'a Path>,
    /// The Python that has vLLM.
    pub vllm_python: Option<&'a Path>,
    /// More for vLLM's command line.
    pub vllm_args: &'a str,
}

/// The contenders that are there, ours first, and why others are not.
///
/// # Errors
/// Ours is not there.
pub fn find(places: &Places<'_>) -> anyhow::Result<(Vec<Contender>, Vec<String>)> {
    let beside = std::env::current_exe().ok();
    let beside = beside.as_deref().and_then(Path::parent);
    let quire = match places.quire {
        Some(path) => Some(path.to_path_buf()),
        None => program::find(beside, "quire"),
    };
    let Some(quire) = quire.filter(|path| path.is_file()) else {
        anyhow::bail!(
            "no quire beside this program: build it (cargo build --release) or name it with --quire"
        );
    };
    let model = places.model.to_path_buf();
    let words = |arguments: &str| arguments.split_whitespace().map(str::to_owned).collect();
    let mut there = vec![Contender {
        who: Who::Quire,
        program: quire.clone(),
        model: model.clone(),
        more: words(places.quire_args),
    }];
    let mut absent = Vec::new();
    match program::find(places.llama_bin, "llama-server") {
        Some(program) => there.push(Contender {
            who: Who::LlamaServer,
            program,
            model: model.clone(),
            more: Vec::new(),
        }),
        None => absent.push(
            "llama-server is skipped: build llama.cpp as docs/measure.md says and name its build/bin with --llama-bin, or put it in PATH"
                .to_owned(),
        ),
    }
    match mistral_rs(places.mistralrs_bin) {
        Some(program) => there.push(Contender {
            who: Who::MistralRs,
            program,
            model,
            more: Vec::new(),
        }),
        None => absent.push(
            "mistral.rs is skipped: install its server (cargo install mistralrs-cli, for this processor, as docs/measure.md says) and name it with --mistralrs-bin, or put it in PATH"
                .to_owned(),
        ),
    }
    match (places.vllm_python, places.hf_model) {
        (Some(python), Some(model)) => there.extend([
            Contender {
                who: Who::QuireSame,
                program: quire,
                model: model.to_path_buf(),
                more: words(places.quire_args),
            },
            Contender {
                who: Who::Vllm,
                program: python.to_path_buf(),
                model: model.to_path_buf(),
                more: words(places.vllm_args),
            },
        ]),
        _ => absent.push(
            "vLLM is skipped: install its CPU build as docs/measure.md says, then name its Python with --vllm-python and a directory of the same model with --hf-model"
                .to_owned(),
        ),
    }
    Ok((there, absent))
}

/// What mistral.rs's server was called before there was one program for all it does, [`MISTRAL_RS`].
const MISTRAL_RS_SERVER: &str = "mistralrs-server";
const MISTRAL_RS: &str = "mistralrs";

/// Where mistral.rs is: a program, or the directory it is in; `None`: the path.
fn mistral_rs(place: Option<&Path>) -> Option<PathBuf> {
    if let Some(program) = place.filter(|place| place.is_file()) {
        return Some(program.to_path_buf());
    }
    program::find(place, MISTRAL_RS).or_else(|| program::find(place, MISTRAL_RS_SERVER))
}

impl Contender {
    /// The command that starts it at `port`.
    pub fn command(&self, port: u16, settings: Settings) -> Command {
        let Settings {
            threads,
            clients,
            room,
        } = settings;
        let mut command = Command::new(&self.program);
        let listen = ["--host", "127.0.0.1", "--port"];
        match self.who {
            Who::Quire | Who::QuireSame => {
                command.args(["serve", "--http", &format!("127.0.0.1:{port}")]);
                // A free one: nobody asks it.
                command.args(["--grpc", "127.0.0.1:0", "--threads", &threads.to_string()]);
                command.arg("--model").arg(&self.model);
                command.args(&self.more);
            }
            Who::LlamaServer => {
                command.args(listen).arg(port.to_string());
                // A slot for every client, with as much context as a request needs: a slot's share is the whole divided by the slots.
                let context = clients * room.next_multiple_of(256);
                command.args(["-np", &clients.to_string(), "-c", &context.to_string()]);
                command.args(["-t", &threads.to_string()]);
                command.arg("-m").arg(&self.model);
            }
            Who::MistralRs => {
                let old = self.program.file_stem() == Some(MISTRAL_RS_SERVER.as_ref());
                if old {
                    command.args(["--serve-ip", "127.0.0.1", "--port"]);
                } else {
                    command.arg("serve").args(listen);
                }
                command.arg(port.to_string());
                // Without --cpu it would look for a GPU. Beyond it, its defaults, as with the others.
                command.args(["--cpu", "--max-seqs", &clients.to_string()]);
                command.args(if old {
                    &["gguf"][..]
                } else {
                    &["--format", "gguf"]
                });
                // A file is named by its directory, as if it were a repository, and its name there.
                let folder = self.model.parent().filter(|of| !of.as_os_str().is_empty());
                command.arg("-m").arg(folder.unwrap_or(Path::new(".")));
                command.arg("-f");
                command.args(self.model.file_name());
                command.envs([
                    ("HF_HUB_OFFLINE", "1"),
                    ("RAYON_NUM_THREADS", &threads.to_string()),
                    // Of a build with MKL.
                    ("OMP_NUM_THREADS", &threads.to_string()),
                ]);
            }
            Who::Vllm => {
                command.args(["-m", "vllm.entrypoints.openai.api_server"]);
                command.args(listen).arg(port.to_string());
                command.args(["--max-model-len", &room.next_multiple_of(256).to_string()]);
                command.args(["--max-num-seqs", &clients.to_string()]);
                command.arg("--model").arg(&self.model);
                command.args(&self.more);
                command.envs([
                    ("HF_HUB_OFFLINE", "1"),
                    ("VLLM_NO_USAGE_STATS", "1"),
                    ("VLLM_CPU_KVCACHE_SPACE", "4"),
                    ("OMP_NUM_THREADS", &threads.to_string()),
                ]);
            }
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    fn command(who: Who, program: &str, model: &str, more: &str) -> Command {
        let contender = Contender {
            who,
            program: PathBuf::from(program),
            model: PathBuf::from(model),
            more: more.split_whitespace().map(str::to_owned).collect(),
        };
        let settings = Settings {
            threads: 2,
            clients: 32,
            room: 320,
        };
        contender.command(8123, settings)
    }

    fn line(command: &Command) -> String {
        let words: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        words.join(" ")
    }

    fn words(who: Who, more: &str) -> String {
        line(&command(who, "program", "model", more))
    }

    #[test]
    fn each_server_has_room_for_every_client() {
        assert_eq!(
            words(Who::LlamaServer, ""),
            "--host 127.0.0.1 --port 8123 -np 32 -c 16384 -t 2 -m model"
        );
        let vllm = words(Who::Vllm, "--dtype float32 --enforce-eager");
        assert!(
            vllm.contains("--max-model-len 512 --max-num-seqs 32")
                && vllm.ends_with("--dtype float32 --enforce-eager"),
            "{vllm}"
        );
        assert!(words(Who::Quire, "").starts_with("serve --http 127.0.0.1:8123"));
    }

    #[test]
    fn mistral_rs_is_started_as_either_of_its_programs_wants_it() {
        let line_of = |program, model| line(&command(Who::MistralRs, program, model, ""));
        assert_eq!(
            line_of("bin/mistralrs", "models/q4_0.gguf"),
            "serve --host 127.0.0.1 --port 8123 --cpu --max-seqs 32 --format gguf -m models -f q4_0.gguf"
        );
        assert_eq!(
            line_of("bin/mistralrs-server", "q4_0.gguf"),
            "--serve-ip 127.0.0.1 --port 8123 --cpu --max-seqs 32 gguf -m . -f q4_0.gguf"
        );
        let command = command(Who::MistralRs, "mistralrs", "q4_0.gguf", "");
        let threads = command
            .get_envs()
            .find(|(name, _)| *name == "RAYON_NUM_THREADS");
        assert_eq!(threads.and_then(|(_, value)| value), Some("2".as_ref()));
    }

    #[test]
    fn mistral_rs_is_found_by_its_name_or_in_its_directory() {
        let here = std::env::temp_dir().join(format!("quire-mistralrs-{}", std::process::id()));
        std::fs::create_dir_all(&here).unwrap();
        assert_eq!(mistral_rs(Some(&here)), None);
        let [old, new] = [MISTRAL_RS_SERVER, MISTRAL_RS].map(|name| here.join(name));
        std::fs::write(&old, "").unwrap();
        assert_eq!(mistral_rs(Some(&here)).as_ref(), Some(&old));
        std::fs::write(&new, "").unwrap();
        assert_eq!(mistral_rs(Some(&here)).as_ref(), Some(&new));
        assert_eq!(mistral_rs(Some(&old)).as_ref(), Some(&old));
        std::fs::remove_dir_all(here).unwrap();
    }

    #[test]
    fn who_is_there_is_told_all_and_who_is_absent_is_named_with_the_way_to_install_it() {
        let quire = std::env::current_exe().unwrap();
        let places = Places {
            model: Path::new("m.gguf"),
            hf_model: None,
            quire: Some(&quire),
            quire_args: "--bf16-activations --kv-cache-dtype f32",
            llama_bin: Some(Path::new("/nowhere")),
            mistralrs_bin: Some(Path::new("/nowhere")),
            vllm_python: None,
            vllm_args: "",
        };
        let (there, absent) = find(&places).unwrap();
        assert_eq!(there.len(), 1);
        let settings = Settings {
            threads: 2,
            clients: 1,
            room: 256,
        };
        let command = there[0].command(1, settings);
        let told: Vec<_> = command.get_args().collect();
        assert!(told.ends_with(&["--bf16-activations", "--kv-cache-dtype", "f32"].map(OsStr::new)));
        assert!(absent[0].contains("llama-server is skipped") && absent[0].contains("--llama-bin"));
        assert!(absent[1].contains("mistral.rs is skipped") && absent[1].contains("cargo install"));
        assert!(absent[1].contains("--mistralrs-bin"));
        assert!(absent[2].contains("vLLM is skipped") && absent[2].contains("--vllm-python"));
        let nowhere = Places {
            quire: Some(Path::new("/nowhere/quire")),
            ..places
        };
        assert!(find(&nowhere).is_err());
    }
}
