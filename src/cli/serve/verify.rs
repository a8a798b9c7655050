//! `respodiff audit verify`: whether an audit log is whole, whether the quotas in it were kept, and whether its
//! pictures can be made again.

use super::super::{Place, parts, rerun, say, tell, warn};
use super::audit::{Begun, Event, Line, Outcome, none, sha256};
use super::policy::{Document, Scope};
use super::quotas::{Counts, Shares, Stream, Turn, period};
use crate::concept::Concept;
use crate::draws::Draws;
use crate::engine::Engine;
use crate::image::GenerationInfo;
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(in super::super) struct Args {
    /// The file of `respodiff serve --audit`
    log: PathBuf,
    /// Make so many of the log's pictures again, and compare them bit for bit
    #[arg(long, default_value_t = 0, value_name = "N")]
    remake: usize,
    /// Seed of the draw of these pictures
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Checkpoint folder, single file or Hugging Face model id of the pictures that are made again [default: the demo]
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    parts: parts::Flags,
    /// Folder of the server's concept files [default: the demo's own concepts]
    #[arg(long, value_name = "FOLDER")]
    concepts: Option<PathBuf>,
    /// Device to compute on
    #[arg(long, default_value_t = Place::Auto)]
    device: Place,
}

pub(in super::super) fn run(args: &Args) -> Result<()> {
    let path = &args.log;
    let log = std::fs::read(path).map_err(Error::io("read", path))?;
    let mut check = Check::default();
    let whole = log.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    for (i, line) in log[..whole].split_inclusive(|byte| *byte == b'\n').enumerate() {
        check.line(i + 1, &line[..line.len() - 1]);
    }
    if whole < log.len() {
        warn("the last line was cut off; the server takes it off when it starts again");
    }
    if check.lines == 0 {
        return Err(Error::damaged(path, "holds no line of an audit log").advise("give the file of serve --audit"));
    }
    check.report();
    if args.remake > 0 {
        check.remake(args)?;
    }
    match check.problems.first() {
        None => Ok(()),
        Some(first) => {
            check.problems.iter().skip(1).take(20).for_each(|problem| warn(problem));
            let problem = format!("{first}; {} problems in all", check.problems.len());
            Err(Error::mismatch(path.as_path(), problem))
        }
    }
}

/// The pictures of a stream that were checked.
#[derive(Default)]
struct Streamed {
    shares: Vec<f64>,
    /// The combinations of the latest pictures without a gap.
    latest: Vec<usize>,
    pictures: usize,
    windows: usize,
    wrong: usize,
}

/// The state of a log after some lines.
#[derive(Default)]
struct Check {
    lines: usize,
    last: Option<String>,
    problems: Vec<String>,
    policy: Option<Document>,
    /// True since the log was opened, for each stream that has gone on since.
    counts: Counts,
    streams: BTreeMap<(Option<String>, String), Streamed>,
    /// The streams that have gone on since the log was opened last.
    going: Vec<(Option<String>, String)>,
    /// Pictures that are begun and not ended, by the hashes of their lines.
    open: HashMap<String, Box<Begun>>,
    /// Pictures that can be made again: the lines' numbers, the records and the hashes of the files.
    finished: Vec<(usize, GenerationInfo, String)>,
    begun: usize,
    ended: [usize; 3],
    unnamed: usize,
}

impl Check {
    fn problem(&mut self, line: usize, problem: &str) {
        self.problems.push(format!("line {line}: {problem}"));
    }

    fn line(&mut self, number: usize, bytes: &[u8]) {
        let hash = sha256(bytes);
        let before = self.last.replace(hash.clone()).unwrap_or_else(none);
        let line: Line = match serde_json::from_slice(bytes) {
            Ok(line) => line,
            Err(problem) => return self.problem(number, &format!("not a line of an audit log: {problem}")),
        };
        self.lines += 1;
        if line.previous != before {
            self.problem(number, "the line before it is not the one that was there when this line was written");
        }
        match line.event {
            Event::Opened { policy, .. } => {
                self.policy = policy;
                self.going.clear();
            }
            Event::Begun(begun) => {
                self.begun += 1;
                for turn in &begun.quotas {
                    self.turn(number, turn, begun.tenant.as_deref());
                }
                let prompt = begun.parameters["prompt"].as_str().unwrap_or_default();
                if begun.has_prompts && sha256(prompt.as_bytes()) != begun.prompt_sha256 {
                    self.problem(number, "the prompt's hash is that of another prompt");
                }
                self.open.insert(hash, begun);
            }
            Event::Ended { picture, outcome, sha256 } => {
                self.ended[outcome as usize] += 1;
                let Some(begun) = self.open.remove(&picture) else {
                    return self.problem(number, "a picture has ended that is not in work");
                };
                match (outcome, sha256) {
                    (Outcome::Finished, None) => self.problem(number, "a finished picture has no hash"),
                    (Outcome::Finished, Some(_)) if !begun.has_prompts => self.unnamed += 1,
                    (Outcome::Finished, Some(file)) => match serde_json::from_value(begun.parameters) {
                        Ok(info) => self.finished.push((number, info, file)),
                        Err(problem) => self.problem(number, &format!("the parameters are no record: {problem}")),
                    },
                    _ => (),
                }
            }
        }
    }

    /// Checks a choice of the quotas against the policy, the stream so far, and the windows that end with it.
    fn turn(&mut self, line: usize, turn: &Turn, tenant: Option<&str>) {
        let Stream { tenant: of, groups } = &turn.stream;
        if of.is_some() && of.as_deref() != tenant {
            self.problem(line, "the quota of one tenant was used for another");
        }
        let scope = if of.is_some() { Scope::Tenant } else { Scope::All };
        if !groups.iter().all(|group| self.policy.as_ref().is_some_and(|policy| is_in(policy, group, scope))) {
            self.problem(line, &format!("the quota {} is not in the log's policy", turn.stream.key()));
        }
        let place = (of.clone(), turn.stream.key());
        let mut expected = self.counts.next(turn.stream.clone());
        let is_new = !self.going.contains(&place);
        if expected.count < turn.count && is_new && turn.count < 1 << 32 {
            // Pictures that a server without this log has begun.
            let missing = turn.count - expected.count;
            tell(&format!("line {line}: {missing} pictures of {} are not in this log", place.1));
            while expected.count < turn.count {
                self.counts.add(&expected);
                expected = self.counts.next(turn.stream.clone());
            }
            self.streams.entry(place.clone()).or_default().latest.clear();
        }
        if *turn != expected {
            let problem = format!(
                "picture {} of {} got combination {}; the quotas give picture {} combination {}",
                turn.count, place.1, turn.combination, expected.count, expected.combination
            );
            self.problem(line, &problem);
        }
        self.counts.add(turn);
        if is_new {
            self.going.push(place.clone());
        }
        let stream = self.streams.entry(place).or_default();
        stream.shares = turn.stream.shares();
        stream.pictures += 1;
        stream.latest.push(turn.combination);
        let Some(period) = period(&stream.shares) else { return };
        if stream.latest.len() > period {
            stream.latest.remove(0);
        }
        if stream.latest.len() == period {
            stream.windows += 1;
            let found = |i: usize| stream.latest.iter().filter(|&&other| other == i).count() as f64;
            let exact = |(i, share): (usize, &f64)| (found(i) - share * period as f64).abs() < 1e-6;
            stream.wrong += usize::from(!stream.shares.iter().enumerate().all(exact));
        }
    }

    fn report(&mut self) {
        let [finished, failed, cancelled] = self.ended;
        say(&format!("{} lines, the last with the hash {}", self.lines, self.last.as_deref().unwrap_or_default()));
        say(&format!(
            "{} pictures begun: {finished} finished, {failed} failed, {cancelled} cancelled, {} without an end",
            self.begun,
            self.open.len()
        ));
        let mut wrong = Vec::new();
        for ((tenant, key), stream) in &self.streams {
            let whose = tenant.as_deref().map_or("everybody".into(), |tenant| format!("tenant {tenant}"));
            let windows = match period(&stream.shares) {
                None => "shares without a window".into(),
                Some(n) => format!("exact in {} of {} windows of {n}", stream.windows - stream.wrong, stream.windows),
            };
            say(&format!("{key} for {whose}: {} pictures, {windows}", stream.pictures));
            if stream.wrong > 0 {
                wrong.push(format!("{key} for {whose}: {} windows are not exact", stream.wrong));
            }
        }
        self.problems.extend(wrong);
    }

    /// Makes some of the pictures again.
    fn remake(&mut self, args: &Args) -> Result<()> {
        let engine = Engine::open(&args.parts.source(args.model.as_deref())?, args.device.open()?)?;
        let fingerprint = engine.fingerprint()?;
        let of_model = |info: &GenerationInfo| info.model_fingerprint.as_ref() == Some(&fingerprint);
        let mut candidates: Vec<_> = self.finished.iter().filter(|(_, info, _)| of_model(info)).collect();
        if candidates.is_empty() {
            let problem = format!("no finished picture of {} has its prompt in the log", engine.name());
            let advice = match self.unnamed {
                0 => "give the model of the log's pictures with --model",
                _ => {
                    "the policy kept prompts out (audit_prompts = false), and without them no picture can be made again"
                }
            };
            return Err(Error::not_found(args.log.as_path(), problem).advise(advice));
        }
        let mut draws = Draws::new(args.seed, 0xa0d1);
        let (mut made, mut other) = (0, Vec::new());
        let find = |file: &str| match &args.concepts {
            Some(folder) => crate::Concept::load(folder.join(format!("{file}.safetensors"))),
            None => Concept::open(file),
        };
        let device = engine.device().name();
        if candidates.iter().any(|(_, info, _)| info.device.as_ref() != Some(&device)) {
            warn(&format!("some pictures were made on another device than {device}, which rounds differently"));
        }
        while made < args.remake && !candidates.is_empty() {
            let (line, info, file) = candidates.swap_remove((draws.next() % candidates.len() as u64) as usize);
            let picture = rerun::remake(&engine, info, &find)?;
            made += 1;
            if sha256(&picture.to_recorded_png(info)?) != *file {
                other.push(format!("line {line}: the picture made again is another one"));
            }
        }
        say(&format!("{made} pictures made again, {} of them the same to the last bit", made - other.len()));
        self.problems.extend(other);
        Ok(())
    }
}

/// True if a policy has a quota of these concepts, shares and scope.
fn is_in(policy: &Document, group: &Shares, scope: Scope) -> bool {
    policy.quota.iter().any(|quota| {
        let shares = quota.shares.clone().unwrap_or_else(|| vec![1.0; quota.concepts.len()]);
        let total: f64 = shares.iter().sum();
        let near = |(a, b): (&f64, &f64)| (a / total - b).abs() < 1e-9;
        quota.scope == scope && quota.concepts == group.concepts && shares.iter().zip(&group.shares).all(near)
    })
}
