//! CLIP's tokenizer, which turns a prompt into the ids that a text encoder reads.
//!
//! transformers has had two recipes for this, which differ on Chinese and control characters, emoji and special tokens.
//! Both are rebuilt here around the byte-pair encoder of the `tokenizers` crate; [`TokenizerRules`] chooses.
//!
//! Two differences remain. transformers' slow recipe drops characters that are unassigned in the Unicode version of its
//! Python, and this module keeps those that newer versions assign. Its fast recipe finds a special token in capitals
//! only with certain flags in the checkpoint's files; this module never finds it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display, Formatter};
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeBuilder, Merges, Vocab};
use tokenizers::pattern::Invert;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::utils::SysRegex;
use tokenizers::{
    Model, NormalizedString, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior, Token,
};

use super::chunks::Group;
use crate::{Error, Result};

/// `BasicTokenizer._is_chinese_char`, for use inside a character class.
const IDEOGRAPHS: &str = concat!(
    r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}",
    r"\x{2B740}-\x{2B81F}\x{2B820}-\x{2CEAF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}",
);

/// The characters that `BasicTokenizer._clean_text` drops: U+FFFD, and every control, format, private-use and
/// unassigned character except tab, line feed and carriage return.
const DROPPED: &str = r"[^\P{C}\t\n\r]|\x{FFFD}";

/// Words that are found before all others.
const FIXED: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d";

/// Words that `CLIPTokenizer.bpe` never splits, whatever the special tokens are.
const WHOLE: [&str; 2] = ["<|startoftext|>", "<|endoftext|>"];

/// The largest `model_max_length` that a configuration may have.
const MAX_LENGTH: u64 = 65_536;

/// Context length if the configuration gives none: that of every CLIP text encoder.
const DEFAULT_LENGTH: usize = 77;

/// The recipe by which a prompt is split into words, before the byte-pair encoder splits those into tokens. Most
/// prompts have the same ids by both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenizerRules {
    /// transformers' `CLIPTokenizerFast`, which is its only one from version 5 on.
    #[default]
    Fast,
    /// transformers' `CLIPTokenizer` up to version 4, without `ftfy`: it drops control characters, and makes each
    /// ideograph a word.
    Slow,
}

impl Display for TokenizerRules {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TokenizerRules::Fast => "fast",
            TokenizerRules::Slow => "slow",
        })
    }
}

impl FromStr for TokenizerRules {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let all = [TokenizerRules::Fast, TokenizerRules::Slow];
        all.into_iter().find(|rules| rules.to_string() == name).ok_or_else(|| {
            Error::invalid("tokenizer", format!("`{name}` is no recipe of a tokenizer")).advise("give fast or slow")
        })
    }
}

/// A prompt as ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// [`Tokenizer::length`] ids: start, tokens of the prompt, end, padding.
    pub ids: Vec<i64>,
    /// The number of `ids` that are tokens of the prompt.
    pub tokens_used: usize,
    /// The end of the prompt that did not fit, from the first word that is not wholly in `ids`; empty if all of it
    /// fits.
    pub lost: String,
    /// The names of the embeddings ([`Tokenizer::with_embeddings`]) that the prompt uses.
    pub embeddings: BTreeSet<String>,
}

impl Encoded {
    /// Writes the ids as a text encoder reads them. The rest of a longer row is filled with the last id, the padding.
    pub(crate) fn fill(&self, row: &mut [f32]) {
        let padding = self.ids.last().copied().unwrap_or(0);
        row.iter_mut()
            .zip(self.ids.iter().copied().chain(std::iter::repeat(padding)))
            .for_each(|(r, id)| *r = id as f32);
    }
}

/// A CLIP tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    bpe: BPE,
    rules: TokenizerRules,
    words: SysRegex,
    dropped: SysRegex,
    special: BTreeMap<String, u32>,
    special_words: SysRegex,
    /// The ids of the embeddings by their names in lower case.
    embeddings: BTreeMap<String, Range<u32>>,
    /// Finds the names of embeddings in a prompt, if there are any.
    embedding_words: Option<SysRegex>,
    bos: u32,
    eos: u32,
    pad: u32,
    unk: u32,
    length: usize,
    vocab_size: usize,
}

impl Tokenizer {
    /// Reads a diffusers `tokenizer/` folder: `vocab.json` and `merges.txt`, or else their content inside
    /// `tokenizer.json`. Special tokens and length come from `tokenizer_config.json`, `special_tokens_map.json` and
    /// `added_tokens.json`, if these exist.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] if the folder has no tokenizer; [`crate::ErrorKind::Damaged`] names a file that
    /// is malformed, [`crate::ErrorKind::Io`] one that cannot be read.
    pub fn load(dir: &Path) -> Result<Self> {
        let read = |name: &str| match fs::read(dir.join(name)) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("read", dir.join(name))(error)),
        };
        let mut parts = Parts::default();
        match (read("vocab.json")?, read("merges.txt")?) {
            (Some(vocab), Some(merges)) => parts.vocab_and_merges(dir, &vocab, &merges)?,
            _ => match read("tokenizer.json")? {
                Some(bytes) => parts.tokenizer_json(&dir.join("tokenizer.json"), &bytes)?,
                None => {
                    let problem = "no tokenizer here: it needs vocab.json and merges.txt (or tokenizer.json)";
                    return Err(Error::not_found(dir, problem).advise("give a whole checkpoint"));
                }
            },
        }
        if let Some(bytes) = read("added_tokens.json")? {
            let path = dir.join("added_tokens.json");
            let added: BTreeMap<String, u32> = json_of(&bytes, &path)?;
            parts.added.extend(added);
        }
        let config = read("tokenizer_config.json")?;
        parts.build(dir, config.as_deref(), read("special_tokens_map.json")?.as_deref())
    }

    /// Builds from the bytes of the same files, for a tokenizer that is compiled into the program.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] names the malformed file.
    pub fn from_bytes(
        vocab: &[u8],
        merges: &[u8],
        config: Option<&[u8]>,
        special_tokens_map: Option<&[u8]>,
    ) -> Result<Self> {
        let mut parts = Parts::default();
        parts.vocab_and_merges(Path::new(""), vocab, merges)?;
        parts.build(Path::new(""), config, special_tokens_map)
    }

    /// The tokenizer of all CLIP text encoders that have the original vocabulary, which is compiled in. They differ
    /// only in `pad`, the token that fills up a prompt.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Damaged`] if `pad` is not in the vocabulary; there are no others.
    pub fn clip(pad: &str) -> Result<Self> {
        let mut parts = Parts::default();
        let merges = include_str!("clip-tokenizer/merges.txt");
        parts.vocab = clip_vocabulary(merges).zip(0..).collect();
        parts.merges("merges.txt".as_ref(), merges)?;
        parts.build(Path::new(""), None, Some(json!({"pad_token": pad}).to_string().as_bytes()))
    }

    /// The same tokenizer with other rules.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Internal`] if the patterns of the rules cannot be compiled.
    pub fn with_rules(self, rules: TokenizerRules) -> Result<Self> {
        Ok(Tokenizer { rules, words: words(rules)?, ..self })
    }

    /// The same tokenizer with embeddings of textual inversion (arXiv 2208.01618): names, and the ids of their vectors.
    /// In a prompt a name is a word of its own in any case of its letters, with `embedding:` before it or without.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Internal`] if the pattern of the names cannot be compiled.
    pub fn with_embeddings(self, embeddings: &[(String, Range<u32>)]) -> Result<Self> {
        let embeddings: BTreeMap<String, Range<u32>> =
            embeddings.iter().map(|(name, ids)| (name.to_lowercase(), ids.clone())).collect();
        let mut names: Vec<&String> = embeddings.keys().collect();
        // Of two names that start alike, the longer one must match, so it comes first.
        names.sort_by_key(|name| std::cmp::Reverse(name.len()));
        let within = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        let pattern = |name: &String| {
            let before = if within(name.chars().next()) { r"(?<![\p{L}\p{N}])" } else { "" };
            let after = if within(name.chars().next_back()) { r"(?![\p{L}\p{N}])" } else { "" };
            format!("{before}{}{after}", escape(name))
        };
        let patterns: Vec<String> = names.into_iter().map(pattern).collect();
        let pattern = format!("(?i:(?:embedding:)?(?:{}))", patterns.join("|"));
        let internal = |error| Error::internal(format!("the pattern of embeddings' names: {error}"));
        let words = (!embeddings.is_empty()).then(|| SysRegex::new(&pattern).map_err(internal)).transpose()?;
        Ok(Tokenizer { embeddings, embedding_words: words, ..self })
    }

    /// The names of the embeddings, in lower case.
    pub fn embeddings(&self) -> impl Iterator<Item = &str> {
        self.embeddings.keys().map(String::as_str)
    }

    /// An embedding by its name, in any case of its letters.
    pub(super) fn embedding(&self, name: &str) -> Option<Group> {
        let name = name.to_lowercase();
        let ids = self.embeddings.get(&name)?;
        Some(Group { ids: ids.clone().collect(), embedding: Some(name) })
    }

    /// The number of ids that [`Tokenizer::encode`] returns: `model_max_length`, 77 for CLIP.
    pub fn length(&self) -> usize {
        self.length
    }

    /// One more than the largest id: the text encoder's embedding needs at least this many rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Turns a prompt into ids, and returns the part that did not fit. A special token typed in the prompt becomes its
    /// id, as in transformers.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if the text cannot be tokenized; no such text is known.
    pub fn encode(&self, prompt: &str) -> Result<Encoded> {
        let prompt = &*self.expand(prompt);
        let encoding = self.tokenize(prompt, true).map_err(untokenizable)?;
        let tokens = encoding.get_ids();
        let tokens_used = tokens.len().min(self.length - 2);
        let ids = self.framed(&tokens[..tokens_used]);
        let used = self.grouped(&tokens[..tokens_used]).into_iter().filter_map(|group| group.embedding);

        let words = encoding.get_word_ids();
        let first_lost = words.get(tokens_used).and_then(|word| words.iter().position(|other| other == word));
        let lost = first_lost
            .and_then(|index| encoding.get_offsets().get(index))
            .and_then(|&(start, _)| prompt.get(start..))
            .map_or_else(String::new, |rest| rest.trim_end().to_string());
        Ok(Encoded { ids, tokens_used, lost, embeddings: used.collect() })
    }

    /// Start, these tokens, which must fit, end and padding.
    pub(crate) fn framed(&self, tokens: &[u32]) -> Vec<i64> {
        let mut ids: Vec<i64> = Vec::with_capacity(self.length);
        ids.extend([self.bos].iter().chain(tokens).chain([&self.eos]).map(|&id| i64::from(id)));
        ids.resize(self.length, i64::from(self.pad));
        ids
    }

    /// The tokens of a text, one by one, but those of an embedding together. Without `named`, names of embeddings are
    /// words like all others.
    ///
    /// # Errors
    /// As for [`Tokenizer::encode`].
    pub(super) fn groups(&self, text: &str, named: bool) -> Result<Vec<Group>> {
        let encoding = self.tokenize(&self.expand(text), named).map_err(untokenizable)?;
        Ok(self.grouped(encoding.get_ids()))
    }

    fn grouped(&self, mut ids: &[u32]) -> Vec<Group> {
        let mut groups = Vec::new();
        while let Some(&first) = ids.first() {
            let embedding = self.embeddings.iter().find(|(_, range)| range.start == first);
            let length = embedding.map_or(1, |(_, range)| range.len()).min(ids.len());
            let (group, rest) = ids.split_at(length);
            groups.push(Group { ids: group.to_vec(), embedding: embedding.map(|(name, _)| name.clone()) });
            ids = rest;
        }
        groups
    }

    /// True if this is the token of a comma.
    pub(super) fn is_comma(&self, ids: &[u32]) -> bool {
        self.bpe.token_to_id(",</w>").is_some_and(|comma| ids == [comma])
    }

    /// Expands the tokens of textual inversion (arXiv 2208.01618). An embedding of several vectors has one token per
    /// vector: `<cat>`, `<cat>_1`, `<cat>_2`. In a prompt the first stands for all of them, as in diffusers'
    /// `maybe_convert_prompt`.
    fn expand<'a>(&self, prompt: &'a str) -> std::borrow::Cow<'a, str> {
        let mut text = std::borrow::Cow::Borrowed(prompt);
        let first = |token: &&String| self.special.contains_key(&format!("{token}_1"));
        for token in self.special.keys().filter(first) {
            if !text.contains(token.as_str()) || text.contains(&format!("{token}_1")) {
                continue;
            }
            let others = (1..).map(|i| format!("{token}_{i}")).take_while(|other| self.special.contains_key(other));
            let all = std::iter::once(token.clone()).chain(others).collect::<Vec<_>>().join(" ");
            text = text.replace(token.as_str(), &all).into();
        }
        text
    }

    fn tokenize(&self, prompt: &str, named: bool) -> tokenizers::Result<tokenizers::Encoding> {
        let whole = |word: &str, id: u32| vec![Token::new(id, word.to_string(), (0, word.len()))];
        let mut text = PreTokenizedString::from(prompt);
        if let Some(words) = self.embedding_words.as_ref().filter(|_| named) {
            text.split(|_, part| {
                let pieces = part.split(words, SplitDelimiterBehavior::Isolated)?;
                Ok(pieces.into_iter().map(|piece| {
                    let name = piece.get().to_lowercase();
                    let find = |name: &str| self.embeddings.get(name).cloned();
                    let ids = find(&name).or_else(|| find(name.strip_prefix("embedding:")?));
                    let tokens = ids.map(|ids| ids.flat_map(|id| whole(piece.get(), id)).collect());
                    (piece, tokens)
                }))
            })?;
        }
        text.split(|_, part| {
            let pieces = part.split(&self.special_words, SplitDelimiterBehavior::Isolated)?;
            Ok(pieces.into_iter().map(|piece| {
                let token = self.special.get(piece.get()).map(|&id| whole(piece.get(), id));
                (piece, token)
            }))
        })?;
        text.normalize(|part| {
            if self.rules == TokenizerRules::Slow {
                part.replace(&self.dropped, "")?;
                part.nfc();
                lowercase(part);
            } else {
                part.nfc();
                part.lowercase();
            }
            Ok(())
        })?;
        text.split(|_, part| part.split(Invert(&self.words), SplitDelimiterBehavior::Removed))?;
        // The fast tokenizer splits words once more, by GPT-2's pattern. That changes only a special token in capitals.
        ByteLevel::new(false, false, self.rules == TokenizerRules::Fast).pre_tokenize(&mut text)?;
        text.tokenize(|word| {
            let word = word.get();
            if self.rules == TokenizerRules::Slow && WHOLE.contains(&word) {
                return Ok(whole(word, self.bpe.token_to_id(word).unwrap_or(self.unk)));
            }
            self.bpe.tokenize(word)
        })?;
        text.into_encoding(None, 0, OffsetType::Byte)
    }
}

/// The files of a tokenizer's folder with CLIP's vocabulary, by name, for [`Tokenizer::load`] and for transformers.
pub(crate) fn clip_files(pad: &str) -> Vec<(&'static str, Vec<u8>)> {
    let merges = include_str!("clip-tokenizer/merges.txt");
    let vocabulary: serde_json::Map<String, Value> =
        clip_vocabulary(merges).zip(0u32..).map(|(token, id)| (token, id.into())).collect();
    let [start, end] = WHOLE;
    let special = json!({"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad});
    let mut config = special.clone();
    config["tokenizer_class"] = "CLIPTokenizer".into();
    config["model_max_length"] = DEFAULT_LENGTH.into();
    config["do_lower_case"] = true.into();
    vec![
        ("vocab.json", Value::Object(vocabulary).to_string().into_bytes()),
        ("merges.txt", merges.into()),
        ("tokenizer_config.json", format!("{config:#}\n").into_bytes()),
        ("special_tokens_map.json", format!("{special:#}\n").into_bytes()),
    ]
}

/// CLIP's tokens in the order of their ids: the bytes (as GPT-2 writes them: printable ones as themselves, the others
/// as characters from 256 on), the same at a word's end, the product of each merge, start and end of text.
fn clip_vocabulary(merges: &str) -> impl Iterator<Item = String> {
    let printable = |byte: &char| matches!(byte, '!'..='~' | '¡'..='¬' | '®'..='ÿ');
    let bytes = ('\0'..='ÿ').filter(printable).chain(('\u{100}'..).take(256 - 188));
    let ends = bytes.clone().map(|byte| format!("{byte}</w>"));
    let joined = merges.trim().lines().skip(1).map(|line| line.replace(' ', ""));
    bytes.map(String::from).chain(ends).chain(joined).chain(WHOLE.map(String::from))
}

/// Python's `str.lower`, which unlike `NormalizedString::lowercase` knows the Greek final sigma.
fn lowercase(text: &mut NormalizedString) {
    let lower = text.get().to_lowercase();
    let changes = text.get().chars().flat_map(|c| c.to_lowercase().enumerate()).map(|(i, _)| isize::from(i > 0));
    let dest: Vec<(char, isize)> = lower.chars().zip(changes).collect();
    text.transform(dest, 0);
}

/// The contents of a tokenizer's files.
#[derive(Default)]
struct Parts {
    vocab: Vocab,
    merges: Merges,
    /// Tokens outside the vocabulary, which are matched in the prompt literally.
    added: BTreeMap<String, u32>,
}

impl Parts {
    fn vocab_and_merges(&mut self, dir: &Path, vocab: &[u8], merges: &[u8]) -> Result<()> {
        let (vocab_path, path) = (dir.join("vocab.json"), dir.join("merges.txt"));
        let vocab: BTreeMap<String, u32> = json_of(vocab, &vocab_path)?;
        self.vocab = vocab.into_iter().collect();
        self.merges(&path, std::str::from_utf8(merges).map_err(|error| malformed(&path, &error))?)
    }

    /// The text of `merges.txt`.
    fn merges(&mut self, path: &Path, text: &str) -> Result<()> {
        // The first line is a version, which transformers skips without looking.
        for (index, line) in text.trim().lines().enumerate().skip(1) {
            self.merge(path, &format!("line {}", index + 1), &line.split_whitespace().collect::<Vec<_>>())?;
        }
        Ok(())
    }

    fn tokenizer_json(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let json: Value = json_of(bytes, path)?;
        let model = &json["model"];
        let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array()) else {
            return Err(malformed(path, &"not a byte-pair encoder, as CLIP needs"));
        };
        for (token, id) in vocab {
            self.vocab.insert(token.clone(), token_id(path, token, id)?);
        }
        for (index, merge) in merges.iter().enumerate() {
            let pair: Vec<&str> = match merge {
                Value::String(pair) => pair.split_whitespace().collect(),
                Value::Array(pair) => pair.iter().filter_map(Value::as_str).collect(),
                _ => Vec::new(),
            };
            self.merge(path, &format!("merge {index}"), &pair)?;
        }
        for token in json["added_tokens"].as_array().into_iter().flatten() {
            if let Some(content) = content(token) {
                self.added.insert(content.to_string(), token_id(path, content, &token["id"])?);
            }
        }
        Ok(())
    }

    fn merge(&mut self, path: &Path, place: &str, pair: &[&str]) -> Result<()> {
        let &[left, right] = pair else {
            return Err(malformed(path, &format!("{place} is not a pair of tokens")));
        };
        // `BpeBuilder` indexes past its buffer when it meets a product that is longer than every token.
        let product = format!("{left}{right}");
        if let Some(unknown) = [left, right, &product].into_iter().find(|token| !self.vocab.contains_key(*token)) {
            return Err(malformed(path, &format!("{place}: token {unknown:?} is not in the vocabulary")));
        }
        self.merges.push((left.to_string(), right.to_string()));
        Ok(())
    }

    fn build(mut self, dir: &Path, config: Option<&[u8]>, special_tokens_map: Option<&[u8]>) -> Result<Tokenizer> {
        let config_path = dir.join("tokenizer_config.json");
        let config = object(&config_path, config)?;
        let map_path = dir.join("special_tokens_map.json");
        let mut map = object(&map_path, special_tokens_map)?;
        if let Some(tokens) = config["added_tokens_decoder"].as_object() {
            // transformers lets the map overrule the configuration, unless the configuration lists the added tokens
            // itself.
            map = Value::Null;
            for (id, token) in tokens {
                let (Some(content), Ok(id)) = (content(token), id.parse()) else {
                    return Err(malformed(&config_path, &"added_tokens_decoder is not a map of ids to tokens"));
                };
                self.added.insert(content.to_string(), id);
            }
        }
        let setting = |key: &str| match &map[key] {
            Value::Null => (&config[key], config_path.as_path()),
            value => (value, map_path.as_path()),
        };
        let named = |key: &str, default: &'static str| {
            let (value, path) = setting(key);
            (content(value).unwrap_or(default), path)
        };

        let mut special = self.added;
        let mut add = |(token, path): (&str, &Path)| match (special.get(token), self.vocab.get(token)) {
            (Some(&id), _) => Ok(id),
            (None, Some(&id)) => {
                special.insert(token.to_string(), id);
                Ok(id)
            }
            (None, None) => Err(malformed(path, &format!("special token {token:?} is not in the vocabulary"))),
        };
        let bos = add(named("bos_token", WHOLE[0]))?;
        let eos = add(named("eos_token", WHOLE[1]))?;
        let pad = add(named("pad_token", WHOLE[1]))?;
        let unk_name = named("unk_token", WHOLE[1]);
        let unk = add(unk_name)?;
        let (additional, path) = setting("additional_special_tokens");
        for token in additional.as_array().into_iter().flatten().filter_map(content) {
            add((token, path))?;
        }

        // An unset length is written as 10^30, which does not fit a u64.
        let length = match config["model_max_length"].as_u64() {
            None => DEFAULT_LENGTH,
            Some(length @ 3..=MAX_LENGTH) => length as usize,
            Some(length) => {
                return Err(malformed(&config_path, &format!("model_max_length {length} is not in 3..={MAX_LENGTH}")));
            }
        };
        let vocab_size = self.vocab.values().chain(special.values()).max().map_or(0, |&id| id as usize + 1);
        let bpe = BpeBuilder::new()
            .vocab_and_merges(self.vocab, self.merges)
            .end_of_word_suffix("</w>".to_string())
            .unk_token(unk_name.0.to_string())
            .build()
            .map_err(|error| malformed(&dir.join("merges.txt"), &error))?;

        // Of two special tokens that start alike, the longer one must match, so it comes first.
        let mut literals: Vec<&String> = special.keys().filter(|literal| !literal.is_empty()).collect();
        literals.sort_by_key(|literal| std::cmp::Reverse(literal.len()));
        let literals: Vec<String> = literals.into_iter().map(|literal| escape(literal)).collect();
        let rules = TokenizerRules::default();
        let regex = |pattern: &str| SysRegex::new(pattern).map_err(|error| malformed(dir, &error));
        Ok(Tokenizer {
            bpe,
            rules,
            words: words(rules)?,
            dropped: regex(DROPPED)?,
            special_words: regex(&literals.join("|"))?,
            special,
            embeddings: BTreeMap::new(),
            embedding_words: None,
            bos,
            eos,
            pad,
            unk,
            length,
            vocab_size,
        })
    }
}

fn untokenizable(error: tokenizers::Error) -> Error {
    Error::invalid("prompt", format!("cannot tokenize the prompt: {error}"))
}

/// The pattern of a word.
fn words(rules: TokenizerRules) -> Result<SysRegex> {
    let pattern = match rules {
        TokenizerRules::Fast => format!(r"{FIXED}|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"),
        // This is `CLIPTokenizer.pat`, in which each ideograph is a word, since `BasicTokenizer` puts spaces around it.
        // U+0345, a mark whose case folding is a letter, matches none of the ignore-case classes of Python's `regex`.
        TokenizerRules::Slow => {
            format!(r"(?i:{FIXED})|[{IDEOGRAPHS}]|[\p{{L}}--[{IDEOGRAPHS}]]+|\p{{N}}|[^\s\p{{L}}\p{{N}}\x{{345}}]+")
        }
    };
    SysRegex::new(&pattern).map_err(|error| Error::internal(format!("the pattern of a word: {error}")))
}

/// The text of a special token: a string, or an `AddedToken` object.
fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

fn token_id(path: &Path, token: &str, id: &Value) -> Result<u32> {
    let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| malformed(path, &format!("the id of token {token:?} is not a number")))
}

/// Parses the bytes of a JSON file.
fn json_of<T: serde::de::DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<T> {
    crate::json::parse(std::str::from_utf8(bytes).map_err(|error| malformed(path, &error))?, path)
}

fn object(path: &Path, bytes: Option<&[u8]>) -> Result<Value> {
    let Some(bytes) = bytes else { return Ok(Value::Null) };
    match json_of(bytes, path)? {
        value @ Value::Object(_) => Ok(value),
        _ => Err(malformed(path, &"not a JSON object")),
    }
}

/// Escapes a literal for use in a pattern.
fn escape(literal: &str) -> String {
    literal.chars().map(|c| format!(r"\x{{{:x}}}", u32::from(c))).collect()
}

fn malformed(path: &Path, problem: &dyn std::fmt::Display) -> Error {
    Error::damaged(path, format!("{problem}")).advise("the tokenizer is damaged, download its folder again")
}
