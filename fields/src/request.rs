//! The fields of a request for pictures.

use crate::{Fields, Wrong};
use serde::Deserialize;

/// A request for pictures, with every field that may be left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    /// Id of the model, for servers that have several.
    pub model: Option<String>,
    /// The words that say what to show: one prompt or several.
    pub prompts: Vec<String>,
    /// The words that say what to avoid.
    pub negative_prompt: Option<String>,
    /// The prompt of SDXL's second text encoder; by default the prompt.
    pub prompt_2: Option<String>,
    /// The negative prompt of SDXL's second text encoder; by default the negative prompt.
    pub negative_prompt_2: Option<String>,
    /// The syntax of all prompts: `plain`, `a1111` or `comfy`; plain by default.
    pub prompt_syntax: Option<String>,
    /// Clip skip as A1111 counts it; 1, the default, skips nothing.
    pub clip_skip: Option<usize>,
    /// Number of pictures of each prompt.
    pub n: usize,
    /// Width in pixels; the checkpoint's own by default.
    pub width: Option<usize>,
    /// Height in pixels; the checkpoint's own by default.
    pub height: Option<usize>,
    /// Seed of the first picture; each next picture has the next one. By default a random one.
    pub seed: Option<u64>,
    /// Sampling steps.
    pub steps: Option<usize>,
    /// Guidance scale.
    pub guidance: Option<f32>,
    /// Share by which the standard deviation of guided predictions is brought to that without guidance.
    pub guidance_rescale: Option<f32>,
    /// Name of the sampler.
    pub sampler: Option<String>,
    /// The sampler's eta.
    pub eta: Option<f64>,
    /// Concepts that every picture gets: names, with `:WEIGHT` behind them or without.
    pub concepts: Vec<String>,
    /// Groups of concepts, of which each picture gets one by exact quotas: `woman,man` or `woman,man=0.6,0.4`.
    pub balance: Vec<String>,
    /// Adapters that change the model for every picture: names and weights.
    pub loras: Vec<(String, f32)>,
}

/// A text, or a list of texts.
#[derive(Deserialize)]
#[serde(untagged)]
enum Prompts {
    One(String),
    Several(Vec<String>),
}

/// `woman`, or `{"name": "woman", "weight": 0.8}`; likewise for adapters.
#[derive(Deserialize)]
#[serde(untagged)]
enum Named {
    Name(String),
    Weighted { name: String, weight: Option<f32> },
}

/// `"woman,man"`, `["woman", "man"]` or `[["woman", "man"], ["white", "black"]]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Balance {
    Text(String),
    Names(Vec<String>),
    Groups(Vec<Vec<String>>),
}

impl Balance {
    fn groups(self) -> Vec<String> {
        match self {
            Balance::Text(text) => vec![text],
            // Texts with commas are whole groups.
            Balance::Names(names) if names.iter().any(|name| name.contains(',')) => names,
            Balance::Names(names) if names.is_empty() => Vec::new(),
            Balance::Names(names) => vec![names.join(",")],
            Balance::Groups(groups) => groups.into_iter().map(|names| names.join(",")).collect(),
        }
    }
}

impl Named {
    fn parts(self) -> (String, Option<f32>) {
        match self {
            Named::Name(name) => (name, None),
            Named::Weighted { name, weight } => (name, weight),
        }
    }
}

/// A concept as [`Request::concepts`] has it.
fn concept(named: Named) -> String {
    match named.parts() {
        (name, None) => name,
        (name, Some(weight)) => format!("{name}:{weight}"),
    }
}

fn lora(named: Named) -> (String, f32) {
    let (name, weight) = named.parts();
    (name, weight.unwrap_or(1.0))
}

fn size(text: &str) -> Result<(usize, usize), Wrong> {
    let parsed = text.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    parsed.ok_or_else(|| Wrong::new("size", format!("`{text}` is not a size; write 512x512, or auto")))
}

impl Request {
    /// Takes the fields of a request, all but `model`. Others may be left.
    ///
    /// # Errors
    /// About the first field that is not what it should be, and about `prompt` if there is none.
    pub fn take(fields: &mut Fields) -> Result<Self, Wrong> {
        const WHOLE: &str = "a whole number";
        const SEED: &str = "a whole number from 0, or -1 for a random one";
        let prompts = match fields.take("prompt", "a text, or a list of texts")? {
            None => return Err(Wrong::new("prompt", "a prompt is needed")),
            Some(Prompts::One(prompt)) => vec![prompt],
            Some(Prompts::Several(prompts)) => prompts,
        };
        if prompts.is_empty() {
            return Err(Wrong::new("prompt", "the list is empty; give a prompt"));
        }
        let n = fields.take("n", WHOLE)?.unwrap_or(1);
        if n == 0 {
            return Err(Wrong::new("n", "0 pictures are none; give 1 or more"));
        }
        let sides: Option<String> = fields.take("size", "a text such as 512x512")?;
        let sides = sides.filter(|text| text != "auto").map(|text| size(&text)).transpose()?;
        let (width, height) = (fields.take("width", WHOLE)?, fields.take("height", WHOLE)?);
        if sides.is_some() && (width.is_some() || height.is_some()) {
            return Err(Wrong::new("size", "the size is there twice; give `size`, or `width` and `height`"));
        }
        // As elsewhere, -1 asks for a random seed. A number of 64 bits may have a sign or not.
        let seed: Option<i128> = fields.take("seed", SEED)?;
        let seed = seed
            .filter(|seed| *seed != -1)
            .map(|seed| u64::try_from(seed).map_err(|_| Wrong::new("seed", format!("{seed} is not {SEED}"))));
        const NAMED: &str = "a list of names, or of {name, weight}";
        let concepts: Option<Vec<Named>> = fields.take("concepts", NAMED)?;
        let loras: Option<Vec<Named>> = fields.take("loras", NAMED)?;
        let balance: Option<Balance> = fields.take("balance", "a list of names, or of lists of names")?;
        Ok(Request {
            model: None,
            prompts,
            n,
            width: sides.map(|(width, _)| width).or(width),
            height: sides.map(|(_, height)| height).or(height),
            seed: seed.transpose()?,
            negative_prompt: fields.take("negative_prompt", "a text")?,
            prompt_2: fields.take("prompt_2", "a text")?,
            negative_prompt_2: fields.take("negative_prompt_2", "a text")?,
            prompt_syntax: fields.take("prompt_syntax", "plain, a1111 or comfy")?,
            clip_skip: fields.take("clip_skip", WHOLE)?,
            steps: fields.take("num_inference_steps", WHOLE)?,
            guidance: fields.take("guidance_scale", "a number")?,
            guidance_rescale: fields.take("guidance_rescale", "a number")?,
            sampler: fields.take("sampler", "a text")?,
            eta: fields.take("eta", "a number")?,
            concepts: concepts.unwrap_or_default().into_iter().map(concept).collect(),
            balance: balance.map_or_else(Vec::new, Balance::groups),
            loras: loras.unwrap_or_default().into_iter().map(lora).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(text: &str) -> Result<Request, Wrong> {
        let mut fields = Fields::parse(text.as_bytes())?;
        let request = Request::take(&mut fields)?;
        fields.finish().map(|()| request)
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        let expected = Request { prompts: vec!["x".into()], n: 1, ..Request::default() };
        assert_eq!(taken("{\"prompt\": \"x\"}").unwrap(), expected);
        assert_eq!(taken("{\"prompt\": [\"x\"], \"seed\": -1, \"size\": \"auto\", \"n\": null}").unwrap(), expected);
    }

    #[test]
    fn every_field_is_taken() {
        let text = r#"{"prompt": ["a", "b"], "negative_prompt": "c", "n": 2, "width": 72, "height": 64,
            "seed": 18446744073709551615, "num_inference_steps": 9, "guidance_scale": 2.5,
            "guidance_rescale": 0.5, "sampler": "Euler a", "eta": 0.25, "prompt_2": "k", "negative_prompt_2": "l",
            "prompt_syntax": "comfy", "clip_skip": 2, "loras": ["m", {"name": "o", "weight": -0.5}],
            "concepts": ["d", {"name": "e", "weight": 0.5}, {"name": "f"}], "balance": [["g", "h"], ["i", "j"]]}"#;
        let texts = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let expected = Request {
            model: None,
            prompts: texts(&["a", "b"]),
            negative_prompt: Some("c".into()),
            prompt_2: Some("k".into()),
            negative_prompt_2: Some("l".into()),
            prompt_syntax: Some("comfy".into()),
            clip_skip: Some(2),
            n: 2,
            width: Some(72),
            height: Some(64),
            seed: Some(u64::MAX),
            steps: Some(9),
            guidance: Some(2.5),
            guidance_rescale: Some(0.5),
            sampler: Some("Euler a".into()),
            eta: Some(0.25),
            concepts: texts(&["d", "e:0.5", "f"]),
            balance: texts(&["g,h", "i,j"]),
            loras: vec![("m".into(), 1.0), ("o".into(), -0.5)],
        };
        assert_eq!(taken(text).unwrap(), expected);
        let sized = taken(r#"{"prompt": "x", "size": "72x64", "balance": ["woman", "man"]}"#).unwrap();
        assert_eq!((sized.width, sized.height), (Some(72), Some(64)));
        assert_eq!(sized.balance, ["woman,man"]);
    }

    #[test]
    fn mistakes_name_their_fields() {
        for (text, field, word) in [
            ("", None, "not a JSON object"),
            ("[1]", None, "not a JSON object"),
            ("{}", Some("prompt"), "needed"),
            (r#"{"prompt": 1}"#, Some("prompt"), "a list of texts"),
            (r#"{"prompt": []}"#, Some("prompt"), "empty"),
            (r#"{"prompt": "x", "n": 0}"#, Some("n"), "none"),
            (r#"{"prompt": "x", "n": -1}"#, Some("n"), "a whole number"),
            (r#"{"prompt": "x", "seed": -2}"#, Some("seed"), "-1 for a random one"),
            (r#"{"prompt": "x", "seed": 1.5}"#, Some("seed"), "a whole number"),
            (r#"{"prompt": "x", "seed": 18446744073709551616}"#, Some("seed"), "a whole number"),
            (r#"{"prompt": "x", "size": "64"}"#, Some("size"), "512x512"),
            (r#"{"prompt": "x", "size": "64x64", "width": 64}"#, Some("size"), "twice"),
            (r#"{"prompt": "x", "clip_skip": -1}"#, Some("clip_skip"), "a whole number"),
            (r#"{"prompt": "x", "prompt_syntax": 3}"#, Some("prompt_syntax"), "a1111"),
            (r#"{"prompt": "x", "loras": "m"}"#, Some("loras"), "a list"),
            (r#"{"prompt": "x", "guidance_scale": "high"}"#, Some("guidance_scale"), "a number"),
            (r#"{"prompt": "x", "negative-prompt": "y"}"#, Some("negative-prompt"), "`negative_prompt`"),
            (r#"{"prompt": "x", "guidance": 3}"#, Some("guidance"), "`guidance_scale`"),
        ] {
            let wrong = taken(text).unwrap_err();
            assert_eq!(wrong.field.as_deref(), field, "{text}");
            assert!(wrong.problem.contains(word), "{text}: {wrong}");
        }
    }
}
