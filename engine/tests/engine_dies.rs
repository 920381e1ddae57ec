//! The engine thread ends by a fault: everybody who waits for something is told so.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use common::{demo_checkpoint, submit};
use quire::core::{Engine, EngineConfig, Event, FinishReason, Request, StepReport, SubmitError};
use quire::generation::Generator;
use quire::sampling::SamplingParams;
use quire::serve::{Addresses, Metrics, ServeError, Server};
use quire_scheduler::TokenId;

/// Longer than anything here takes; who waits for ever is found by it.
const PATIENCE: Duration = Duration::from_secs(60);

fn start(observer: impl FnMut(StepReport) + Send + 'static) -> Engine {
    let (backend, config) = (common::backend(1), EngineConfig::default());
    let observer = Some(Box::new(observer) as Box<_>);
    Engine::start(&demo_checkpoint(), backend, &config, observer, &mut |_| {}).unwrap()
}

fn request() -> Request {
    Request {
        id: "test".into(),
        prompt: vec![TokenId(1); 20],
        sampling: SamplingParams {
            max_tokens: 1000,
            n: 2,
            ignore_eos: true,
            ..SamplingParams::default()
        },
        priority: 0,
        tenant: "".into(),
        cache_salt: 0,
        deadline: None,
    }
}

#[tokio::test]
async fn what_the_engine_never_saw_is_told_that_it_has_failed() {
    let (in_step, steps) = mpsc::channel();
    let (go, gone) = mpsc::channel::<()>();
    let engine = start(move |_| {
        in_step.send(()).unwrap();
        gone.recv().unwrap_err();
        panic!("a fault, as the test wants it");
    });
    let running = submit(&engine, &request());
    steps.recv().unwrap();
    let unseen = submit(&engine, &request());
    let mut events = engine.subscribe_kv_events(0);
    tokio::select! {
        biased;
        news = events.next() => panic!("{news:?} of an engine that does nothing"),
        () = std::future::ready(()) => {}
    }
    drop(go);
    tokio::time::timeout(PATIENCE, engine.stopped())
        .await
        .unwrap();

    for mut stream in [running, unseen] {
        let mut failed = 0;
        while let Some(event) = tokio::time::timeout(PATIENCE, stream.next()).await.unwrap() {
            failed += u32::from(matches!(
                event,
                Event::Finished {
                    reason: FinishReason::Failed,
                    ..
                }
            ));
        }
        assert_eq!(failed, 2, "one for each sample");
    }
    let news = tokio::time::timeout(PATIENCE, events.next()).await.unwrap();
    assert!(news.is_none(), "{news:?}");
    assert!(matches!(
        engine.submit(request()),
        Err(SubmitError::Stopped)
    ));
}

/// A request for a completion and everything that comes of it.
fn complete(address: SocketAddr, stream: bool) -> std::io::Result<String> {
    let body = format!(
        r#"{{"prompt": "The type Vec", "max_tokens": 1900, "ignore_eos": true, "stream": {stream}}}"#
    );
    let mut connection = TcpStream::connect(address)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    write!(
        connection,
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn a_server_answers_its_clients_before_it_ends() {
    const CLIENTS: u32 = 16;
    let (all, there) = mpsc::channel::<()>();
    let engine = start(move |step| {
        // The first step waits until everybody is there.
        let _ = there.recv();
        assert!(step.sequences < CLIENTS, "a fault, as the test wants it");
    });
    let generator = Generator::new(engine.clone(), &demo_checkpoint()).unwrap();
    let (tell, address) = mpsc::channel();
    let server = thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        // As in a process of its own, connections end with the runtime.
        runtime.block_on(async move {
            let any = "127.0.0.1:0".parse().unwrap();
            let addresses = Addresses::take(any, any).unwrap();
            let server = Server::listen(generator, Metrics::install(), addresses).unwrap();
            tell.send(server.http_address().unwrap()).unwrap();
            server.run(std::future::pending()).await
        })
    });
    let address = address.recv().unwrap();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| thread::spawn(move || complete(address, n % 2 == 0)))
        .collect();
    let began = Instant::now();
    while engine.stats().in_flight < CLIENTS {
        assert!(began.elapsed() < PATIENCE, "{:?}", engine.stats());
        thread::sleep(Duration::from_millis(1));
    }
    drop(all);
    for (n, client) in clients.into_iter().enumerate() {
        let answer = client.join().unwrap().unwrap();
        assert!(answer.contains("the computation failed"), "{n}: {answer}");
        if n % 2 == 0 {
            assert!(answer.contains("data: [DONE]"), "{answer}");
        } else {
            assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
        }
    }
    let ended = server.join().unwrap();
    assert!(matches!(ended, Err(ServeError::EngineStopped)), "{ended:?}");
}
