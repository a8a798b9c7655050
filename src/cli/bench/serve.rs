//! `respodiff bench serve`: a server under load. Requests come one by one, from several clients at once, and at given
//! rates whether or not the server keeps up (an open loop), up to overload.

use super::super::{Place, model, say};
use crate::draws::Draws;
use crate::engine::{Engine, Event, Image, Request};
use crate::image::GenerationInfo;
use crate::{Error, Picture, Result};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use ureq::Agent;

#[derive(clap::Args)]
pub(in super::super) struct Args {
    /// A server that runs already, such as http://127.0.0.1:8080 [default: one is started for the measurement]
    #[arg(long)]
    url: Option<String>,
    /// Key that the server asks for
    #[arg(long, requires = "url")]
    key: Option<String>,
    /// Model of the server that is started [default: the demo]
    #[arg(long, conflicts_with = "url")]
    model: Option<String>,
    /// Steps of each picture, by the sampler Euler
    #[arg(long, default_value_t = 4)]
    steps: usize,
    /// Requests one by one, and of all clients together
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// Clients at once
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    clients: u16,
    /// Requests per second of the open loop, for example 5,10,20 [default: 0.5, 0.8, 1, 1.5 and 3 times what the
    /// clients got]
    #[arg(long, value_delimiter = ',')]
    rates: Vec<f64>,
    /// Seconds for which requests come at each rate
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Requests come at equal distances, and not at random (as a Poisson process)
    #[arg(long)]
    even: bool,
    /// Seed of the times of arrival
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Device of the server that is started
    #[arg(long, default_value_t = Place::Auto, conflicts_with = "url")]
    device: Place,
}

/// The outcome of a request.
enum Answer {
    /// Milliseconds: in all, in the queue, in the batch.
    Done([f64; 3]),
    /// The queue was full.
    Refused,
    Failed(String),
}

/// A server, and how to ask it.
struct Target {
    agent: Agent,
    url: String,
    key: Option<String>,
    steps: usize,
    next: AtomicUsize,
}

/// The server that was started, which ends with this.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Started {
    /// Resident memory in MiB.
    fn memory(&self) -> Option<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(line.split_whitespace().next()?.parse::<f64>().ok()? / 1024.0)
    }
}

/// The prompt of a request: each has its own, so that none is encoded for another.
fn prompt(number: usize) -> String {
    format!("a photo of a doctor, number {number}")
}

impl Target {
    /// Asks for a picture, as if at `began`.
    fn ask(&self, began: Instant) -> Answer {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let body = serde_json::json!({
            "prompt": prompt(number), "seed": number, "num_inference_steps": self.steps, "sampler": "Euler",
        });
        let mut request = self.agent.post(format!("{}/v1/images/generations", self.url)).header("accept", "image/png");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = match request.send(body.to_string()) {
            Ok(response) => response,
            Err(problem) => return Answer::Failed(problem.to_string()),
        };
        let header = |name: &str| response.headers().get(name)?.to_str().ok()?.parse::<f64>().ok();
        let (queued, worked) = (header("x-queue-time-ms"), header("x-inference-time-ms"));
        let status = response.status().as_u16();
        match (status, response.body_mut().read_to_vec()) {
            (200, Ok(_)) => {
                let all = 1e3 * began.elapsed().as_secs_f64();
                Answer::Done([all, queued.unwrap_or_default(), worked.unwrap_or_default()])
            }
            (429, _) => Answer::Refused,
            (status, body) => {
                Answer::Failed(format!("{status} {}", String::from_utf8_lossy(&body.unwrap_or_default()).trim()))
            }
        }
    }
}

/// The outcomes of some requests.
#[derive(Default)]
struct Outcome {
    done: Vec<[f64; 3]>,
    refused: usize,
    failed: usize,
    /// The first failure.
    problem: Option<String>,
    seconds: f64,
}

impl Outcome {
    fn add(&mut self, answer: Answer) {
        match answer {
            Answer::Done(times) => self.done.push(times),
            Answer::Refused => self.refused += 1,
            Answer::Failed(problem) => {
                self.failed += 1;
                self.problem.get_or_insert(problem);
            }
        }
    }

    /// A quantile of the times of one kind.
    fn quantile(&self, kind: usize, at: f64) -> f64 {
        quantile(self.done.iter().map(|times| times[kind]).collect(), at)
    }

    fn rate(&self) -> f64 {
        self.done.len() as f64 / self.seconds
    }

    fn row(&self, name: &str) {
        let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|at| self.quantile(0, at));
        say(&format!(
            "{name:>16} {:>6} {:>7} {:>6} {:>8.1} {p50:>8.1} {p90:>8.1} {p99:>8.1} {:>9.1} {:>9.1}",
            self.done.len(),
            self.refused,
            self.failed,
            self.rate(),
            self.quantile(1, 0.5),
            self.quantile(1, 0.99),
        ));
        if let Some(problem) = &self.problem {
            super::super::warn(&format!("{name}: {problem}"));
        }
    }
}

/// A quantile by the nearest rank; 0 of nothing.
fn quantile(mut values: Vec<f64>, at: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (at * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

pub(in super::super) fn run(args: &Args) -> Result<()> {
    let possible = |value: f64| value.is_finite() && value > 0.0;
    if !possible(args.seconds) || args.seconds > 86_400.0 {
        return Err(Error::invalid("seconds", format!("{} is not possible", args.seconds)).advise("give 10"));
    }
    if let Some(rate) = args.rates.iter().find(|rate| !possible(**rate) || **rate > 1e5) {
        return Err(Error::invalid("rates", format!("{rate} requests per second are not possible"))
            .advise("give positive numbers, such as 5,10,20"));
    }
    let (started, url) = match &args.url {
        Some(url) => (None, url.trim_end_matches('/').to_string()),
        None => start(args).map(|(child, url)| (Some(child), url))?,
    };
    let agent = Agent::config_builder().http_status_as_error(false).max_idle_connections_per_host(256).build();
    let (key, steps) = (args.key.clone(), args.steps);
    let target = Target { agent: agent.into(), url, key, steps, next: AtomicUsize::new(0) };
    let requests = args.requests as usize;
    // The first picture waits for what is made only once.
    if let Answer::Failed(problem) = target.ask(Instant::now()) {
        return Err(Error::network(target.url.clone(), problem).advise("give the address of a server that is ready"));
    }
    let before = started.as_ref().and_then(Started::memory);
    if started.is_some() {
        compare(args, &target, requests)?;
    }
    say(&format!(
        "{:>16} {:>6} {:>7} {:>6} {:>8} {:>8} {:>8} {:>8} {:>9} {:>9}",
        "", "done", "refused", "failed", "images/s", "p50 ms", "p90 ms", "p99 ms", "queue p50", "queue p99"
    ));
    closed(&target, 1, requests).row("one by one");
    let together = closed(&target, args.clients.into(), requests);
    together.row(&format!("{} clients", args.clients));
    let rates = match &args.rates[..] {
        [] => [0.5, 0.8, 1.0, 1.5, 3.0].map(|share| share * together.rate()).to_vec(),
        rates => rates.to_vec(),
    };
    for rate in rates.into_iter().filter(|rate| *rate > 0.0) {
        open(&target, rate, args).row(&format!("{rate:.1}/s asked"));
    }
    if let (Some(before), Some(after)) = (before, started.as_ref().and_then(Started::memory)) {
        let pictures = target.next.load(Ordering::Relaxed);
        say(&format!("resident memory {before:.1} MiB at the begin, {after:.1} MiB after {pictures} requests"));
    }
    Ok(())
}

/// Starts a server on a port of its own.
fn start(args: &Args) -> Result<(Started, String)> {
    let program = std::env::current_exe().map_err(Error::io("find", "the program"))?;
    let mut command = Command::new(&program);
    command.args(["serve", "--port", "0", "--quiet", "--device", &args.device.to_string()]);
    if let Some(model) = &args.model {
        command.args(["--model", model]);
    }
    let child = command.stdout(Stdio::piped()).spawn();
    let mut started = Started(child.map_err(Error::io("start", &program))?);
    let mut line = String::new();
    if let Some(stdout) = started.0.stdout.as_mut() {
        BufReader::new(stdout).read_line(&mut line).map_err(Error::io("read from", &program))?;
    }
    match line.trim() {
        "" => Err(Error::new(crate::ErrorKind::Io, program, "the server did not start; its message is above")),
        url => Ok((started, url.to_string())),
    }
}

/// Measures what the server adds to a call of the library, in which the prompt is encoded, the picture sampled and its
/// file made. Both take turns.
fn compare(args: &Args, target: &Target, requests: usize) -> Result<()> {
    let engine = Engine::open(&model::source(args.model.as_deref())?, args.device.open()?)?;
    let mut batch = engine.running_batch(engine.options().batch(8).concepts(true))?;
    let info: GenerationInfo = serde_json::from_value(serde_json::json!({
        "prompt": prompt(0), "negative_prompt": null, "steps": args.steps, "sampler": "Euler", "spacing": "Automatic",
        "guidance": 7.5, "seed": 0, "rng": "torch-cpu", "width": 64, "height": 64, "model": engine.name(),
        "model_sha256": null, "version": "",
    }))
    .map_err(|problem| Error::internal(problem.to_string()))?;
    let mut library = |number: usize| -> Result<f64> {
        let began = Instant::now();
        let image = Image::new(engine.encode(prompt(number))?).seed(number as u64);
        batch.join(&Request::from(image).steps(args.steps).sampler("Euler".parse()?))?;
        let picture: Picture = loop {
            match batch.step()?.pop() {
                Some((_, Event::Finished(picture))) => break picture,
                Some((_, Event::Failed(error))) => return Err(error),
                _ => (),
            }
        };
        picture.to_recorded_png(&info)?;
        Ok(1e3 * began.elapsed().as_secs_f64())
    };
    library(0)?;
    let (mut alone, mut served) = (Vec::new(), Outcome::default());
    for number in 0..requests {
        alone.push(library(number)?);
        served.add(target.ask(Instant::now()));
    }
    let added: Vec<f64> = served.done.iter().zip(&alone).map(|(times, alone)| times[0] - alone).collect();
    let [p50, p90] = [0.5, 0.9].map(|at| quantile(alone.clone(), at));
    say(&format!("a call of the library: {p50:.2} ms p50, {p90:.2} p90, of {requests}"));
    let [p50, p90] = [0.5, 0.9].map(|at| served.quantile(0, at));
    say(&format!("a request to the server, in turn with it: {p50:.2} ms p50, {p90:.2} p90"));
    say(&format!("what the server adds: {:.2} ms p50", quantile(added, 0.5)));
    Ok(())
}

/// Some clients, each of which asks again as soon as it has its answer.
fn closed(target: &Target, clients: usize, requests: usize) -> Outcome {
    let left = AtomicUsize::new(requests);
    let began = Instant::now();
    let take = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
    let mut outcome = Outcome::default();
    std::thread::scope(|scope| {
        let (sender, answers) = channel();
        for _ in 0..clients {
            let sender = sender.clone();
            scope.spawn(move || {
                while take() {
                    let _ = sender.send(target.ask(Instant::now()));
                }
            });
        }
        drop(sender);
        answers.iter().for_each(|answer| outcome.add(answer));
    });
    outcome.seconds = began.elapsed().as_secs_f64();
    outcome
}

/// Requests at a rate, whether or not earlier ones are answered. Times count from when a request was due.
fn open(target: &Target, rate: f64, args: &Args) -> Outcome {
    let mut draws = Draws::new(args.seed, rate.to_bits());
    let began = Instant::now();
    let mut outcome = Outcome::default();
    std::thread::scope(|scope| {
        let (sender, answers) = channel();
        let mut at = 0.0;
        loop {
            // The distances of a Poisson process have an exponential distribution.
            let distance = if args.even { 1.0 } else { -(1.0 - f64::from(draws.unit())).ln() };
            at += distance / rate;
            if at > args.seconds {
                break;
            }
            let due = began + Duration::from_secs_f64(at);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let sender = sender.clone();
            scope.spawn(move || sender.send(target.ask(due)));
        }
        drop(sender);
        answers.iter().for_each(|answer| outcome.add(answer));
    });
    outcome.seconds = began.elapsed().as_secs_f64();
    outcome
}
