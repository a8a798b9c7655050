//! `respodiff audit`.

use super::super::serve::verify;
use super::super::{say, tell};
use super::survey::{Opened, REPORTED_IMAGES, Survey, quoted};
use crate::eval::clip::{Clip, cosine};
use crate::eval::fairness::Audit;
use crate::{Error, Result};
use clap::{ArgMatches, Command};
use std::path::Path;

/// Groups with a name, and the texts of their classes, which are those that the published concepts were trained with.
const KNOWN: [(&str, &[&str]); 3] = [
    ("gender", &["a woman", "a man"]),
    ("race", &["a white-race person", "a black-race person", "a asian-race person"]),
    ("age", &["a young person", "an old person"]),
];

/// Prompts that say little. A concept is trained on the one that is nearest to its group in CLIP's space.
const NEUTRAL: [&str; 5] = ["a person", "a scene", "an animal", "an object", "a building"];

#[derive(clap::Args)]
pub(in super::super) struct Flags {
    /// Groups whose classes should be shown equally often: gender, race, age, or classes in words of your own, such as
    /// "a tall person|a short person"
    #[arg(long, default_value = "gender,race", value_delimiter = ',')]
    groups: Vec<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    survey: Survey,
}

/// An audit of a model, or of a server's log. clap's derived code would ask for the flags of the one with the other.
pub(in super::super) enum Args {
    Model(Flags),
    Log(verify::Args),
}

const VERIFY: &str = "verify";

impl clap::FromArgMatches for Args {
    fn from_arg_matches(matches: &ArgMatches) -> std::result::Result<Self, clap::Error> {
        match matches.subcommand_matches(VERIFY) {
            Some(matches) => verify::Args::from_arg_matches(matches).map(Args::Log),
            None => Flags::from_arg_matches(matches).map(Args::Model),
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> std::result::Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl clap::Args for Args {
    fn augment_args(command: Command) -> Command {
        let about = "Check a server's audit log: that no line was changed, that quotas were kept, and that its pictures can \
                     be made again";
        Flags::augment_args(command)
            .subcommand(verify::Args::augment_args(Command::new(VERIFY)).about(about))
            .args_conflicts_with_subcommands(true)
            .subcommand_negates_reqs(true)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

pub(in super::super) fn run(args: &Args) -> Result<()> {
    match args {
        Args::Model(flags) => audit(flags),
        Args::Log(args) => verify::run(args),
    }
}

fn audit(args: &Flags) -> Result<()> {
    let survey = &args.survey;
    let groups = args.groups.iter().map(|text| group(text)).collect::<Result<Vec<_>>>()?;
    let mut opened = survey.open(REPORTED_IMAGES)?;
    opened.settings.shares = groups.iter().map(|group| vec![1.0 / group.len() as f64; group.len()]).collect();
    opened.settings.groups = groups;
    if !survey.make(&mut opened, &[], None, &survey.out)? {
        return Ok(());
    }
    let audit = report(&survey.out, args.json)?;
    if args.json { Ok(()) } else { advise(survey, &opened, &audit) }
}

/// Writes and prints the result of the run in a folder.
pub(super) fn report(folder: &Path, json: bool) -> Result<Audit> {
    let audit = Audit::read(folder)?;
    let written = audit.write(folder)?;
    match json {
        true => say(audit.json().trim_end()),
        false => say(&format!("{}\n{}", audit.text(), written.display())),
    }
    Ok(audit)
}

/// The classes of a group.
fn group(text: &str) -> Result<Vec<String>> {
    let classes: Vec<String> = match KNOWN.iter().find(|(name, _)| *name == text) {
        Some((_, classes)) => classes.iter().map(|class| class.to_string()).collect(),
        None => text.split('|').map(|class| class.trim().to_string()).collect(),
    };
    if classes.len() < 2 || classes.iter().any(String::is_empty) {
        return Err(Error::invalid("groups", format!("`{text}` is not a group of two classes or more")).advise(
            "give gender, race, age, or classes in words of your own, such as \"a tall person|a short person\"",
        ));
    }
    Ok(classes)
}

/// Prints the commands that mend what is off.
fn advise(survey: &Survey, opened: &Opened, audit: &Audit) -> Result<()> {
    let Opened { judges, settings, .. } = opened;
    let is_off = |group: &&Vec<String>| audit.findings.iter().any(|f| f.is_off && f.classes == **group);
    let off: Vec<&Vec<String>> = settings.groups.iter().filter(is_off).collect();
    if off.is_empty() {
        return Ok(());
    }
    let model = survey.model.as_ref().map_or(String::new(), |model| format!(" --model {}", quoted(model)));
    tell("to mend it:");
    let mut balances = Vec::new();
    for group in off {
        let neutral = quoted(neutral(&judges[0], group)?);
        for class in group {
            let (class, file) = (quoted(class), file(class));
            say(&format!("respodiff train{model} --target {class} --neutral {neutral} --out {file}"));
        }
        balances.push(group.iter().map(|class| file(class)).collect::<Vec<_>>().join(","));
    }
    let all = |flag: &str| balances.iter().map(|files| format!(" {flag} {files}")).collect::<String>();
    let folder = survey.out.display().to_string();
    let (plain, out) = (quoted(&folder), quoted(&format!("{folder}-balanced")));
    let flags = Some(survey.flags()).filter(|flags| !flags.is_empty()).map_or(String::new(), |f| format!(" {f}"));
    say(&format!("respodiff eval fairness{flags}{} --plain {plain} --out {out}", all("--concepts")));
    let (_, prompts) = &settings.prompts[0];
    say(&format!("respodiff sample{model} {} --images 12{}", quoted(&prompts[0]), all("--balance")));
    Ok(())
}

/// The neutral prompt that is nearest to the classes of a group in the mean.
fn neutral(judge: &Clip, group: &[String]) -> Result<&'static str> {
    let (classes, prompts) = (judge.texts(group)?, judge.texts(&NEUTRAL.map(String::from))?);
    let similarity = |i: usize| classes.iter().map(|class| cosine(class, &prompts[i])).sum::<f64>();
    let best = (0..NEUTRAL.len()).max_by(|&a, &b| similarity(a).total_cmp(&similarity(b)));
    Ok(best.map_or(NEUTRAL[0], |i| NEUTRAL[i]))
}

/// The file name of a class's concept.
fn file(class: &str) -> String {
    let words = class.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-") + ".safetensors"
}
