//! Prompt syntaxes: how a prompt's text says which of its words weigh more, and where its parts end.
//!
//! The syntaxes are those of the two programs in which most prompts are written. Their meaning is fixed by what these
//! programs do: `parse_prompt_attention` of the A1111 web UI, and `token_weights` of ComfyUI. [`super::chunks`] turns
//! the stretches that are found here into tokens.

use crate::{Error, Result};
use std::fmt::{self, Display, Formatter};
use std::str::FromStr;

/// The factor of a pair of round brackets without a number.
const EMPHASIS: f64 = 1.1;
/// The deepest nesting of brackets.
const MAX_DEPTH: usize = 64;
/// The largest weight of a word, either sign.
const MAX_WEIGHT: f64 = 1000.0;

/// The language of a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PromptSyntax {
    /// Every character is text, and words beyond the text encoder's tokens are lost, as in diffusers.
    #[default]
    Plain,
    /// The A1111 web UI's: `(word)`, `(word:1.3)`, `[word]`, `BREAK`, chunks of 75 tokens that end at commas.
    A1111,
    /// ComfyUI's: `(word)`, `(word:1.3)`, chunks of 75 tokens that keep words whole.
    Comfy,
}

impl Display for PromptSyntax {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PromptSyntax::Plain => "plain",
            PromptSyntax::A1111 => "a1111",
            PromptSyntax::Comfy => "comfy",
        })
    }
}

impl FromStr for PromptSyntax {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let all = [PromptSyntax::Plain, PromptSyntax::A1111, PromptSyntax::Comfy];
        all.into_iter().find(|syntax| syntax.to_string() == name).ok_or_else(|| {
            Error::invalid("prompt_syntax", format!("`{name}` is no syntax of prompts"))
                .advise("give plain, a1111 or comfy")
        })
    }
}

/// A part of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// Words of one weight.
    Text {
        /// The words, without the signs that gave them their weight.
        text: String,
        /// 1 for words that are not marked.
        weight: f64,
    },
    /// The end of a chunk, which is filled up with padding.
    Break,
}

impl PromptSyntax {
    /// The parts of a prompt.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] for weights that are no numbers or too large and for brackets that are nested too
    /// deep, [`crate::ErrorKind::Unsupported`] for what these programs can do and this one cannot: schedules,
    /// alternation, and the combination of prompts by `AND`.
    pub fn parts(self, prompt: &str) -> Result<Vec<Part>> {
        let parts = match self {
            PromptSyntax::Plain => vec![Part::Text { text: prompt.into(), weight: 1.0 }],
            PromptSyntax::A1111 => a1111(prompt)?,
            PromptSyntax::Comfy => comfy(prompt)?,
        };
        for part in &parts {
            if let Part::Text { text, weight } = part
                && !(-MAX_WEIGHT..=MAX_WEIGHT).contains(weight)
            {
                let problem = format!("`{}` has a weight of {weight}", text.chars().take(40).collect::<String>());
                return Err(Error::invalid("prompt", problem).advise("weights from 0.5 to 1.5 are usual"));
            }
        }
        Ok(parts)
    }

    /// True if a prompt that is read as plain text looks as if it was written in another syntax.
    pub fn is_suspect(self, prompt: &str) -> bool {
        let weighted = || {
            prompt.split('(').skip(1).filter_map(|after| after.split_once(')')).any(|(inside, _)| {
                let parts = inside.rsplit_once(':');
                parts.is_some_and(|(word, weight)| !word.is_empty() && weight.trim().parse::<f64>().is_ok())
            })
        };
        let doubled = || prompt.contains("((") && prompt.contains("))");
        self == PromptSyntax::Plain && (weighted() || doubled() || prompt.contains("<lora:"))
    }
}

/// A LoRA that a prompt in A1111's syntax asks for, as `<lora:name:weight>`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraTag {
    /// The name, usually that of a file without its extension.
    pub name: String,
    /// The weight; 1 if the tag has none.
    pub weight: f32,
}

/// Takes the LoRA tags out of a prompt in A1111's syntax. Returns the prompt without them.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for a weight that is no finite number, [`crate::ErrorKind::Unsupported`] for other
/// networks, such as `<hypernet:name>`.
pub fn lora_tags(prompt: &str) -> Result<(String, Vec<LoraTag>)> {
    let (mut text, mut tags, mut rest) = (String::new(), Vec::new(), prompt);
    while let Some((before, tag)) = rest.split_once('<')
        && tag.contains('>')
    {
        text.push_str(before);
        let inside = tag.split_once('>').and_then(|(inside, after)| Some((inside.split_once(':')?, after)));
        match inside {
            Some(((kind, arguments), after)) if is_word(kind) && !arguments.is_empty() => {
                if !["lora", "lyco"].contains(&kind) {
                    let problem = format!("`<{kind}:{arguments}>` asks for a kind of network that is not supported");
                    return Err(Error::unsupported(crate::Subject::Field("prompt"), problem).advise("take it out"));
                }
                tags.push(lora_tag(arguments)?);
                rest = after;
            }
            _ => {
                text.push('<');
                rest = tag;
            }
        }
    }
    Ok((text + rest, tags))
}

/// The arguments of a LoRA tag. A1111 takes one weight for the UNet and another for the text encoder, by position or as
/// `te=` and `unet=`; only one weight for both is known here.
fn lora_tag(arguments: &str) -> Result<LoraTag> {
    let (name, weight) = arguments.split_once(':').unwrap_or((arguments, "1"));
    let weight = weight.trim().parse().ok().filter(|weight: &f32| weight.is_finite()).ok_or_else(|| {
        Error::invalid("prompt", format!("`<lora:{arguments}>` has no number as its weight"))
            .advise("write <lora:name:0.8>")
    })?;
    Ok(LoraTag { name: name.trim().into(), weight })
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.chars().all(is_word_character)
}

/// `\w` of Python's regular expressions.
fn is_word_character(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The places at which `word` stands in `text` on its own.
fn standing_alone<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    text.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = text[..at].chars().next_back().is_some_and(is_word_character);
        let after = text[at + word.len()..].chars().next().is_some_and(is_word_character);
        !before && !after
    })
}

fn too_deep() -> Error {
    Error::invalid("prompt", format!("more than {MAX_DEPTH} brackets are nested")).advise("write (words:1.3)")
}

/// A stretch of A1111's syntax. The word BREAK has a weight of -1 until brackets around it change that.
struct Span {
    text: String,
    weight: f64,
    is_break: bool,
}

fn a1111(prompt: &str) -> Result<Vec<Part>> {
    let (prompt, tags) = lora_tags(prompt)?;
    if let Some(tag) = tags.first() {
        let problem = format!("the prompt asks for `<lora:{}>`, but there is no folder of adapters", tag.name);
        return Err(Error::invalid("lora_folder", problem).advise("say where its file is, or take the tag out"));
    }
    if standing_alone(&prompt, "AND").next().is_some() {
        let problem = "`AND` combines the predictions of several prompts, which is not supported";
        return Err(Error::unsupported(crate::Subject::Field("prompt"), problem).advise("write it in lower case"));
    }
    if let Some(schedule) = schedule(&prompt) {
        let problem = format!("`{schedule}` changes the prompt from step to step, which is not supported");
        return Err(Error::unsupported(crate::Subject::Field("prompt"), problem)
            .advise("decide for one of its words, or write \\[ and \\] for brackets that are meant as text"));
    }
    let mut spans: Vec<Span> = Vec::new();
    // The numbers of spans at which brackets were opened.
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let multiply = |spans: &mut [Span], factor: f64| spans.iter_mut().for_each(|span| span.weight *= factor);
    let mut rest = &prompt[..];
    while let Some(first) = rest.chars().next() {
        if round.len() + square.len() > MAX_DEPTH {
            return Err(too_deep());
        }
        let mut length = first.len_utf8();
        match first {
            '\\' => {
                // A backslash before anything but a bracket or a backslash vanishes.
                let escaped = rest[1..].chars().next().filter(|c| "()[]\\".contains(*c));
                length += escaped.map_or(0, char::len_utf8);
                spans.push(Span { text: escaped.map_or(String::new(), String::from), weight: 1.0, is_break: false });
            }
            '(' => round.push(spans.len()),
            '[' => square.push(spans.len()),
            ')' if !round.is_empty() => {
                multiply(&mut spans[round.pop().unwrap_or(0)..], EMPHASIS);
            }
            ']' if !square.is_empty() => {
                multiply(&mut spans[square.pop().unwrap_or(0)..], 1.0 / EMPHASIS);
            }
            ':' => match closing_weight(rest) {
                Some((number, whole)) if !round.is_empty() => {
                    let weight: f64 = number.parse().map_err(|_| {
                        Error::invalid("prompt", format!("the weight `{number}` is not a number"))
                            .advise("write (words:1.3)")
                    })?;
                    multiply(&mut spans[round.pop().unwrap_or(0)..], weight);
                    length = whole;
                }
                closing => {
                    length = closing.map_or(1, |(_, whole)| whole);
                    spans.push(Span { text: rest[..length].into(), weight: 1.0, is_break: false });
                }
            },
            _ => {
                let special = |c: char| "\\()[]:".contains(c);
                let end = rest.char_indices().skip(1).find(|(_, c)| special(*c)).map_or(rest.len(), |(at, _)| at);
                length = if special(first) { length } else { end };
                push_words(&mut spans, &rest[..length]);
            }
        }
        rest = &rest[length..];
    }
    // Brackets that are not closed run to the end.
    round.into_iter().for_each(|start| multiply(&mut spans[start..], EMPHASIS));
    square.into_iter().for_each(|start| multiply(&mut spans[start..], 1.0 / EMPHASIS));
    Ok(joined(spans))
}

/// A colon, a number and a closing bracket at the beginning of a text: the number and the length of all three.
fn closing_weight(text: &str) -> Option<(&str, usize)> {
    let can_be = |c: char| c.is_whitespace() || c.is_ascii_digit() || "+-.".contains(c);
    let end = text.char_indices().skip(1).find(|(_, c)| !can_be(*c)).filter(|(_, c)| *c == ')')?.0;
    let inside = &text[1..end];
    let number = inside.trim();
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    let is_number = !digits.is_empty() && digits.chars().all(|c| c == '.' || c.is_ascii_digit());
    is_number.then_some((number, inside.len() + 2))
}

/// Adds a text without signs, in which the word BREAK may stand.
fn push_words(spans: &mut Vec<Span>, text: &str) {
    const BREAK: &str = "BREAK";
    let mut start = 0;
    for at in standing_alone(text, BREAK) {
        spans.push(Span { text: text[start..at].trim_end().into(), weight: 1.0, is_break: false });
        spans.push(Span { text: BREAK.into(), weight: -1.0, is_break: true });
        start = at + BREAK.len();
        start += text[start..].len() - text[start..].trim_start().len();
    }
    spans.push(Span { text: text[start..].into(), weight: 1.0, is_break: false });
}

/// The spans as parts: neighbours of one weight are one text, whose words are split into tokens together.
fn joined(spans: Vec<Span>) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for Span { text, weight, is_break } in spans {
        // Inside brackets that change its weight, BREAK is a word.
        if is_break && weight == -1.0 {
            parts.push(Part::Break);
            continue;
        }
        match parts.last_mut() {
            Some(Part::Text { text: before, weight: same }) if *same == weight => before.push_str(&text),
            _ => parts.push(Part::Text { text, weight }),
        }
    }
    parts
}

/// The first stretch of a prompt that A1111 would read as a schedule, `[from:to:when]`, or as an alternation, `[a|b]`.
/// It reads neither if a `|` stands anywhere else, because such a prompt is outside its grammar.
fn schedule(prompt: &str) -> Option<&str> {
    /// A bracket that is open: its sign and place, and the separators directly inside it.
    struct Open {
        sign: char,
        start: usize,
        separators: Vec<(usize, char)>,
    }
    let (mut open, mut found): (Vec<Open>, Option<&str>) = (Vec::new(), None);
    let mut bars = 0;
    let mut characters = prompt.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            // A1111's grammar has no place for a backslash at the end.
            '\\' => {
                characters.next()?;
            }
            '(' | '[' => open.push(Open { sign: c, start: at, separators: Vec::new() }),
            ':' | '|' => {
                bars += usize::from(c == '|');
                if let Some(open) = open.last_mut() {
                    open.separators.push((at, c));
                }
            }
            ')' | ']' => match open.pop() {
                Some(Open { sign: '[', start, separators }) if c == ']' => {
                    let inside = &prompt[start..=at];
                    let alternates = !separators.is_empty() && separators.iter().all(|(_, c)| *c == '|');
                    let when = || separators.last().map_or("", |(last, _)| prompt[last + 1..at].trim_start());
                    let is_timed = |colons: &[(usize, char)]| {
                        colons.iter().all(|(_, c)| *c == ':')
                            && (1..=2).contains(&colons.len())
                            && is_python_number(when())
                    };
                    if alternates {
                        bars -= separators.len();
                    }
                    if found.is_none() && (alternates || is_timed(&separators)) {
                        found = Some(inside);
                    }
                }
                Some(Open { sign: '(', .. }) if c == ')' => {}
                // A bracket that closes another kind leaves no group around it whole.
                _ => open.clear(),
            },
            _ => {}
        }
    }
    found.filter(|_| bars == 0)
}

/// `SIGNED_NUMBER` of the grammar library that A1111 uses: digits with a point or an exponent.
fn is_python_number(text: &str) -> bool {
    text.parse::<f64>().is_ok()
        && text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c))
        && text.ends_with(|c: char| c.is_ascii_digit() || c == '.')
}

/// A character, and whether a backslash before it made a bracket plain text.
type Character = (char, bool);

fn comfy(prompt: &str) -> Result<Vec<Part>> {
    let mut characters: Vec<Character> = Vec::new();
    let mut rest = prompt.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, rest.peek()) {
            ('\\', Some(&bracket @ ('(' | ')'))) => {
                rest.next();
                characters.push((bracket, true));
            }
            _ => characters.push((c, false)),
        }
    }
    let mut parts = Vec::new();
    comfy_weights(&characters, 1.0, 0, &mut parts)?;
    Ok(parts)
}

/// Adds the parts of a stretch. Brackets with a number give that weight, whatever is around them; brackets without one
/// multiply the weight around them.
fn comfy_weights(text: &[Character], weight: f64, depth: usize, parts: &mut Vec<Part>) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(too_deep());
    }
    for item in comfy_items(text) {
        match item {
            [('(', false), inside @ .., (')', false)] => {
                let colon = inside.iter().rposition(|c| *c == (':', false)).filter(|&at| at > 0);
                let number = colon.and_then(|at| {
                    let number: String = inside[at + 1..].iter().map(|(c, _)| c).collect();
                    Some((at, number.trim().parse::<f64>().ok()?))
                });
                match number {
                    Some((at, absolute)) => comfy_weights(&inside[..at], absolute, depth + 1, parts)?,
                    None => comfy_weights(inside, weight * EMPHASIS, depth + 1, parts)?,
                }
            }
            _ => parts.push(Part::Text { text: item.iter().map(|(c, _)| c).collect(), weight }),
        }
    }
    Ok(())
}

/// Splits a stretch into its outermost brackets and what is between them. A bracket that is never closed, and all after
/// one that closes nothing, are text.
fn comfy_items(text: &[Character]) -> Vec<&[Character]> {
    let (mut items, mut start, mut depth) = (Vec::new(), 0, 0i64);
    for (at, c) in text.iter().enumerate() {
        match c {
            ('(', false) => {
                if depth == 0 {
                    items.push(&text[start..at]);
                    start = at;
                }
                depth += 1;
            }
            (')', false) => {
                depth -= 1;
                if depth == 0 {
                    items.push(&text[start..=at]);
                    start = at + 1;
                }
            }
            _ => {}
        }
    }
    items.push(&text[start..]);
    items.retain(|item| !item.is_empty());
    items
}
