//! A1111's text about a picture, as other programs write it.

/// The text's parts, by the rules of A1111's `parse_generation_parameters`.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// The prompt.
    pub prompt: String,
    /// The negative prompt; empty if there is none.
    pub negative_prompt: String,
    /// The settings of the last line, such as `("Steps", "20")`, in their order.
    pub settings: Vec<(String, String)>,
}

impl Parameters {
    /// Reads the text; `None` if its last line is no list of settings.
    pub fn parse(text: &str) -> Option<Self> {
        let (before, last) = text.trim().rsplit_once('\n').unwrap_or(("", text.trim()));
        let settings = settings(last);
        // A1111's own limit is three settings, below which the line is one of the prompt; lists begin with the steps.
        if settings.len() < 3 && settings.first().is_none_or(|(key, _)| key != "Steps") {
            return None;
        }
        let (prompt, negative) = match before.strip_prefix("Negative prompt:") {
            Some(negative) => ("", negative),
            None => before.split_once("\nNegative prompt:").unwrap_or((before, "")),
        };
        Some(Parameters { prompt: prompt.trim().into(), negative_prompt: negative.trim().into(), settings })
    }

    /// The value of a setting.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.settings.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }
}

/// The settings of a line, `key: value, key: "quoted value", ...`.
fn settings(line: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = line.trim();
    while let Some((key, after)) = rest.split_once(':') {
        let after = after.trim_start();
        let (value, behind) = match quoted(after) {
            Some((value, behind)) => (value, behind),
            None => {
                let (value, behind) = after.split_once(',').unwrap_or((after, ""));
                (value.trim().to_string(), behind)
            }
        };
        found.push((key.trim().to_string(), value));
        rest = behind.trim_start_matches([',', ' ']);
    }
    found
}

/// The JSON string with which a text begins, and what comes after it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut strings = serde_json::Deserializer::from_str(text).into_iter::<String>();
    let value = text.starts_with('"').then(|| strings.next())?.and_then(Result::ok)?;
    Some((value, &text[strings.byte_offset()..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_a1111_are_read() {
        let pairs =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<Vec<_>>();
        let text = "a cat, (hat:1.2)\nsecond line: x\nNegative prompt: blurry\nlow\nSteps: 20, Sampler: DPM++ 2M, \
                    CFG scale: 7.5, Lora hashes: \"a: 1, b: \\\"2\\\"\", Version: v1.9";
        let read = Parameters::parse(text).unwrap();
        assert_eq!((&*read.prompt, &*read.negative_prompt), ("a cat, (hat:1.2)\nsecond line: x", "blurry\nlow"));
        let expected = [
            ("Steps", "20"),
            ("Sampler", "DPM++ 2M"),
            ("CFG scale", "7.5"),
            ("Lora hashes", "a: 1, b: \"2\""),
            ("Version", "v1.9"),
        ];
        assert_eq!(read.settings, pairs(&expected));
        assert_eq!(read.get("CFG scale"), Some("7.5"));
        let only = Parameters::parse("Negative prompt: x\nSteps: 1, Seed: 2, Size: 8x8").unwrap();
        assert_eq!((&*only.prompt, &*only.negative_prompt), ("", "x"));
        for text in ["", "a cat", "a cat\nhat: 20", ":", ",,,", "\"", "a:\"", "\n\n"] {
            assert_eq!(Parameters::parse(text), None, "{text:?}");
        }
    }
}
