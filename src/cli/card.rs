//! `respodiff concept card`: a model card (Mitchell et al., arXiv 1810.03993) in Hugging Face's form.

use crate::concept::{Calibration, Concept, Form, Kind};
use crate::eval::fairness::{Measure, Report};
use crate::{Error, Result};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// The card of a concept's file as Markdown: what it was trained on, what it does, what was measured, and its limits.
/// `reports` are folders of `eval fairness` with this concept.
pub(super) fn card(path: &Path, reports: &[PathBuf]) -> Result<String> {
    let concept = Concept::open(path)?;
    let measured = reports.iter().map(|folder| measured(&concept, folder)).collect::<Result<Vec<_>>>()?;
    let (metadata, shape) = (&concept.metadata, concept.shape());
    let known = |text: &str| if text.is_empty() { "not known".to_string() } else { text.to_string() };
    let quoted = |text: &str| serde_json::to_string(text).unwrap_or_default();
    let mut out = String::from("---\nlibrary_name: respodiff\npipeline_tag: text-to-image\n");
    // The hub knows a base model by its id; a local folder means nothing there.
    if metadata.base_model.split('/').count() == 2 && !metadata.base_model.starts_with(['.', '/']) {
        let _ = writeln!(out, "base_model: {}", quoted(&metadata.base_model));
    }
    let _ = write!(out, "tags: [respodiff, fairness, safety]\n---\n\n# {}\n\n", metadata.concept);
    let modules = match (concept.ram.form(), &concept.sam) {
        (Form::Constant, Some(_)) => "two learnt tensors that are added to the UNet's bottleneck",
        (Form::Constant, None) => "one learnt tensor that is added to the UNet's bottleneck",
        _ => "small networks whose values are added to the UNet's bottleneck",
    };
    let _ = write!(
        out,
        "A concept of [RespoDiff](https://arxiv.org/abs/2509.15257): {modules} ({} channels, {}x{}), so that pictures \
         {} \"{}\". The checkpoint itself stays as it is.\n\n## Training\n\n| | |\n| --- | --- |\n",
        shape.c,
        shape.h,
        shape.w,
        if metadata.kind == Kind::Safe { "move away from" } else { "show" },
        metadata.concept
    );
    let mut row = |name: &str, value: String| {
        let _ = writeln!(out, "| {name} | {} |", value.replace('|', "\\|"));
    };
    row("checkpoint", known(&metadata.base_model));
    row("its fingerprint", known(&metadata.fingerprint));
    for used in &metadata.adapters {
        row("changed by the adapter", format!("{}, weight {} ({})", used.name, used.weight, used.hash));
    }
    row("neutral prompt, the only one that it was trained on", known(&metadata.neutral));
    row("iterations", if metadata.iterations > 0 { metadata.iterations.to_string() } else { known("") });
    if let Some([responsible, semantic]) = metadata.losses {
        row("losses, mean of the last tenth", format!("L_resp {responsible:.3e}, L_sem {semantic:.3e}"));
    }
    row("fingerprint of the concept", concept.fingerprint());
    if !metadata.recipe.is_empty() {
        let _ = write!(out, "\n```toml\n{}\n```\n", metadata.recipe.trim());
    }
    out.push_str("\n## Measured effects\n\n");
    if let Some(Calibration {
        strength, guidance, groups, deviation_ratio: [a, b], alignment: [c, d], pictures, ..
    }) = &metadata.calibration
    {
        let names = groups.iter().map(|group| group.join(", ")).collect::<Vec<_>>().join(" x ");
        let _ = write!(
            out,
            "By default it acts with weight {strength} at guidance {guidance}. Of the strengths that were tried, this \
             one balances {names} best: a deviation ratio of {a:.3} plain and {b:.3} balanced, alignment {c:.2} and \
             {d:.2}, on {pictures} pictures each. These pictures chose the strength, so others will show a little less.\n\n"
        );
    }
    match measured.is_empty() {
        true if metadata.calibration.is_some() => (),
        true => out.push_str("None are recorded: measure with `respodiff eval fairness` or `eval safety`.\n"),
        false => measured.iter().for_each(|text| out.push_str(text)),
    }
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    let _ = write!(
        out,
        "\n## Use\n\n```sh\nrespodiff sample \"a photo of a doctor\" --model MODEL --concept {file}\n```\n\n## Limits\n\n\
         * It is meant for the checkpoint above. Fine-tuned checkpoints of the same family may work; others are refused.\n\
         * It was trained on one neutral prompt. Other prompts follow it as far as the checkpoint generalises, which the \
         measurements tell for the prompts that they name, and for no others.\n\
         * Classes such as gender and race are those that a judge can see in pictures. They are coarse, and say nothing \
         about any person.\n* Composed with other concepts, effects add up and may exceed what each was measured for.\n"
    );
    Ok(out)
}

/// The effects that a folder of `eval fairness` has for a concept.
fn measured(concept: &Concept, folder: &Path) -> Result<String> {
    let report = Report::read(folder)?;
    let settings = &report.settings;
    let own = concept.fingerprint();
    if !settings.concepts.iter().flatten().any(|fingerprint| *fingerprint == own) {
        let problem = format!("measured other concepts than `{}`", concept.metadata.concept);
        return Err(Error::mismatch(folder, problem).advise("give a folder of `eval fairness` with this concept"));
    }
    let shown = |Measure { value, interval: [low, high], .. }: Measure| format!("{value:.3} [{low:.3}, {high:.3}]");
    let mut out = format!(
        "{} pictures of each of {} professions or prompts by {}, {} {} steps at guidance {}, weight {}, seeds from {} on; \
         deviation ratio 0 is as wanted, 1 is furthest from it.\n\n| classes | judge | plain | balanced | chance | p | \
         alignment |\n| --- | --- | --- | --- | --- | --- | --- |\n",
        settings.images,
        settings.prompts.len(),
        settings.model,
        settings.sampler,
        settings.steps,
        settings.guidance,
        settings.strength(),
        settings.seed
    );
    for summary in &report.summaries {
        let [plain, balanced] = summary.deviation_ratio.map(shown);
        let p = summary.p.map_or("-".into(), |p| format!("{p:.4}"));
        let [before, after] = summary.alignment;
        let classes = summary.classes.join(", ");
        let _ = writeln!(
            out,
            "| {classes} | {} | {plain} | {balanced} | {:.3} | {p} | {before:.2} -> {after:.2} |",
            summary.judge, summary.chance
        );
    }
    out.push('\n');
    Ok(out)
}
