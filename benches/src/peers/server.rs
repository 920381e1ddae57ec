//! [`Server`]: a peer's server, or ours, as a process on loopback that ends with its owner.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use http_body_util::Empty;
use hyper::{Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, Signal, System};

use super::child::ends_with_us;
use super::program;

/// Between two questions whether it is ready.
const ASK: Duration = Duration::from_millis(200);
/// How long it may take to say whether it is.
const ANSWER: Duration = Duration::from_secs(5);
/// How long it may take to end when it is asked to; then it is killed.
const END: Duration = Duration::from_secs(15);

/// A process that serves.
#[derive(Debug)]
pub struct Server {
    child: Child,
    log: PathBuf,
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    /// From its start until it was ready.
    pub start: Duration,
}

/// A port nobody listens at.
///
/// # Errors
/// There is none.
pub fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port")?;
    Ok(listener.local_addr()?.port())
}

impl Server {
    /// Starts a server that will listen at `port` and waits until `/health` is good. What it says goes into `log`.
    ///
    /// # Errors
    /// It cannot be started, ends, or is not ready in time; the message ends with its last lines.
    pub async fn start(
        mut command: Command,
        port: u16,
        log: &Path,
        patience: Duration,
    ) -> anyhow::Result<Self> {
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let program = command.get_program().to_string_lossy().into_owned();
        let began = Instant::now();
        let child = ends_with_us(&mut command)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {program}"))?;
        let mut server = Self {
            child,
            log: log.to_path_buf(),
            url: format!("http://127.0.0.1:{port}"),
            start: Duration::ZERO,
        };
        loop {
            if let Some(status) = server.child.try_wait()? {
                anyhow::bail!("{program} ended with {status}:\n{}", server.last_words());
            }
            let left = patience.saturating_sub(began.elapsed());
            let ready = tokio::time::timeout(left.min(ANSWER), server.is_ready(port));
            if ready.await.unwrap_or(false) {
                server.start = began.elapsed();
                return Ok(server);
            }
            anyhow::ensure!(
                began.elapsed() < patience,
                "{program} was not ready after {patience:?}:\n{}",
                server.last_words()
            );
            tokio::time::sleep(ASK).await;
        }
    }

    async fn is_ready(&self, port: u16) -> bool {
        // Nothing is sent to a port nobody listens at: a client would try again on its own.
        if TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            return false;
        }
        let client: Client<HttpConnector, Empty<Bytes>> =
            Client::builder(TokioExecutor::new()).build_http();
        let Ok(request) = Request::get(format!("{}/health", self.url)).body(Empty::new()) else {
            return false;
        };
        let answer = client.request(request).await;
        answer.is_ok_and(|answer| answer.status() == StatusCode::OK)
    }

    fn last_words(&self) -> String {
        let said = std::fs::read(&self.log).unwrap_or_default();
        program::tail(&String::from_utf8_lossy(&said))
    }

    /// Its resident memory in bytes, that of its children included; 0 where the system does not tell.
    pub fn memory(&self) -> u64 {
        let Ok(mut system) = System::new() else {
            return 0;
        };
        system.refresh_processes_specifics(
            ProcessesToUpdate::All,
            true,
            ProcessRefreshKind::nothing().with_memory(),
        );
        let own = Pid::from_u32(self.child.id());
        let of_ours = |mut pid: Pid| loop {
            if pid == own {
                return true;
            }
            match system.process(pid).and_then(sysinfo::Process::parent) {
                Some(parent) => pid = parent,
                None => return false,
            }
        };
        let processes = system.processes().iter();
        processes
            // Threads are listed as processes where the system does so.
            .filter(|(pid, process)| process.thread_kind().is_none() && of_ours(**pid))
            .map(|(_, process)| process.memory())
            .sum()
    }

    /// Asks it to end, as its own supervisor would, so that it can end its children.
    fn ask_to_end(&self) {
        let Ok(mut system) = System::new() else {
            return;
        };
        let pid = Pid::from_u32(self.child.id());
        system.refresh_processes_specifics(
            ProcessesToUpdate::Some(&[pid]),
            true,
            ProcessRefreshKind::nothing(),
        );
        if let Some(process) = system.process(pid) {
            process.kill_with(Signal::Term);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ask_to_end();
        let asked = Instant::now();
        while asked.elapsed() < END {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(50)),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        // It may have ended just now.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn a_server_that_ends_at_once_is_an_error_with_its_last_words() {
        let log = std::env::temp_dir().join(format!("quire-bench-{}.log", std::process::id()));
        let started = Server::start(
            shell("echo 'no such model' >&2; exit 3"),
            free_port().unwrap(),
            &log,
            Duration::from_secs(60),
        );
        let error = started.await.unwrap_err().to_string();
        assert!(
            error.contains("ended with exit status: 3") && error.contains("no such model"),
            "{error}"
        );
        std::fs::remove_file(log).unwrap();
    }

    #[tokio::test]
    async fn patience_ends_with_a_server_that_never_answers() {
        // It accepts, as the system does for it, and says nothing.
        let mute = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = mute.local_addr().unwrap().port();
        let log = std::env::temp_dir().join(format!("quire-bench-{port}.log"));
        let patience = Duration::from_millis(300);
        let started = Server::start(shell("exec sleep 600"), port, &log, patience);
        let started = tokio::time::timeout(Duration::from_secs(60), started).await;
        let error = started.expect("it gives up").unwrap_err().to_string();
        assert!(error.contains("was not ready after 300ms"), "{error}");
        std::fs::remove_file(log).unwrap();
    }
}
