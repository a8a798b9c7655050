//! respodiff as a C library. The header `respodiff.h` is generated from these functions and their documentation; its
//! first lines have the rules for errors, memory and threads.

mod failure;

use failure::{Code, Failure, call, invalid, text};
use respodiff::concepts::{Files, Shelf};
use respodiff::hub::HubConfig;
use respodiff::requests::{Answer, Made};
use respodiff::{Concept, Pipeline, Result};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_void};
use std::ops::ControlFlow;
use std::ptr::{null, null_mut};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

/// A checkpoint on a device, ready to make pictures.
pub struct Engine {
    pipeline: Pipeline,
    info: CString,
    /// Concepts that the program has named.
    concepts: RwLock<BTreeMap<String, Arc<Concept>>>,
}

impl Shelf for Engine {
    fn has(&self, name: &str) -> bool {
        self.named(name).is_some() || Files.has(name)
    }

    fn find(&self, name: &str) -> Result<Arc<Concept>> {
        self.named(name).map_or_else(|| Files.find(name), Ok)
    }
}

impl Engine {
    fn named(&self, name: &str) -> Option<Arc<Concept>> {
        self.concepts.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }
}

/// A learnt concept, such as "a woman".
pub struct Named {
    concept: Arc<Concept>,
    name: CString,
}

/// The pictures of a request.
pub struct Pictures {
    pictures: Vec<Kept>,
    warnings: Vec<CString>,
}

struct Kept {
    made: Made,
    parameters: CString,
    /// The file, once it was asked for.
    png: OnceLock<Vec<u8>>,
}

/// Is told how many steps of how many are done, of all pictures of the request together. Any answer but 0 ends the run
/// with RESPODIFF_CODE_CANCELLED. It must return, neither by an exception nor by longjmp.
pub type Progress = Option<unsafe extern "C" fn(user: *mut c_void, done: usize, total: usize) -> i32>;

/// A text argument.
///
/// # Safety
/// `pointer` is NULL or a text that ends with NUL and lives as long as the call.
unsafe fn argument<'a>(pointer: *const c_char, name: &'static str) -> Result<&'a str> {
    if pointer.is_null() {
        return Err(invalid(name, "is NULL"));
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(pointer) }.to_str().map_err(|_| invalid(name, "is not UTF-8"))
}

/// An object argument.
///
/// # Safety
/// `pointer` is NULL or an object that lives as long as the call.
unsafe fn object<'a, T>(pointer: *const T, name: &'static str) -> Result<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }.ok_or_else(|| invalid(name, "is NULL"))
}

/// The place of a result, set to NULL.
///
/// # Safety
/// `pointer` is NULL or may be written for the length of the call.
unsafe fn place<'a, T>(pointer: *mut *mut T, name: &'static str) -> Result<&'a mut *mut T> {
    if pointer.is_null() {
        return Err(invalid(name, "is NULL"));
    }
    // SAFETY: the caller's promise; what was there may be uninitialised and is not read.
    unsafe {
        pointer.write(null_mut());
        Ok(&mut *pointer)
    }
}

/// Frees an object.
///
/// # Safety
/// `pointer` is NULL or came from `Box::into_raw` and was not freed.
unsafe fn free<T>(pointer: *mut T) {
    if !pointer.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { Box::from_raw(pointer) });
    }
}

/// The version of the library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn respodiff_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };
    VERSION.as_ptr()
}

/// Opens a checkpoint. `model` is "demo", a folder as diffusers writes it, a file, or a Hugging Face model id, which is
/// taken from the local cache or downloaded. `options` is NULL or a JSON object: "device" ("auto", "cpu", "cuda",
/// "cuda:1"), "precision" ("full", "bf16", "int8"), "tokenizer" ("fast", "slow"), "vae", "text_encoder" and
/// "text_encoder_2" (folders or files in place of the checkpoint's own), "ema" (true for moving averages), "loras" (a
/// list of files, or of {"file": "a.safetensors", "weight": 0.8}), "lora_folder" (a folder in which requests find such
/// adapters by name), "embeddings" (a list of files and folders with learnt words), "vae_tile" (pixels: larger pictures
/// are encoded and decoded in strips of that size squared, in less memory), "max_batch" (the most pictures that are
/// made at once, 8 by default).
///
/// # Safety
/// The texts end with NUL; `engine` and `error` may be written, or are NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_engine_open(
    model: *const c_char,
    options: *const c_char,
    engine: *mut *mut Engine,
    error: *mut *mut Failure,
) -> Code {
    let open = || {
        // SAFETY: the caller's promise, for all three.
        let (engine, model) = unsafe { (place(engine, "engine")?, argument(model, "model")?) };
        let options = match options.is_null() {
            true => "{}",
            // SAFETY: the caller's promise.
            false => unsafe { argument(options, "options") }?,
        };
        let hub = || HubConfig::from_variables(|name| std::env::var_os(name));
        let pipeline = Pipeline::find(model, options.as_bytes(), &hub)?;
        let info = text(&pipeline.info().to_string());
        *engine = Box::into_raw(Box::new(Engine { pipeline, info, concepts: RwLock::default() }));
        Ok(())
    };
    // SAFETY: the caller's promise.
    unsafe { call(error, open) }
}

/// Describes an engine by a JSON object with "version", "model", "device", "width", "height", "guidance_scale",
/// "max_batch", "bottleneck", and lists of the "samplers" and of the demo's "concepts". NULL for NULL.
///
/// # Safety
/// `engine` is NULL or an engine that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_engine_info(engine: *const Engine) -> *const c_char {
    // SAFETY: the caller's promise.
    unsafe { engine.as_ref() }.map_or(null(), |engine| engine.info.as_ptr())
}

/// Frees an engine, and with it the memory of its weights.
///
/// # Safety
/// `engine` is NULL or an engine that was not freed, and that no other thread uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_engine_free(engine: *mut Engine) {
    // SAFETY: the caller's promise.
    unsafe { free(engine) };
}

/// Reads a concept file, or the demo's concept of that name if there is no such file. Requests may name files
/// themselves; a concept of its own is read once, and goes by a name that the program chooses.
///
/// # Safety
/// The text ends with NUL; `concept` and `error` may be written, or are NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_concept_open(
    path: *const c_char,
    concept: *mut *mut Named,
    error: *mut *mut Failure,
) -> Code {
    let open = || {
        // SAFETY: the caller's promise.
        let (place, path) = unsafe { (place(concept, "concept")?, argument(path, "path")?) };
        let concept = Concept::open(path)?;
        let name = text(&concept.metadata.concept);
        *place = Box::into_raw(Box::new(Named { concept: Arc::new(concept), name }));
        Ok(())
    };
    // SAFETY: the caller's promise.
    unsafe { call(error, open) }
}

/// The prompt that a concept was trained for, such as "a woman". NULL for NULL.
///
/// # Safety
/// `concept` is NULL or a concept that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_concept_name(concept: *const Named) -> *const c_char {
    // SAFETY: the caller's promise.
    unsafe { concept.as_ref() }.map_or(null(), |concept| concept.name.as_ptr())
}

/// Frees a concept. Engines that know it keep it.
///
/// # Safety
/// `concept` is NULL or a concept that was not freed, and that no other thread uses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_concept_free(concept: *mut Named) {
    // SAFETY: the caller's promise.
    unsafe { free(concept) };
}

/// Lets requests to an engine call a concept by a name, before any file of that name. NULL for `concept` forgets the
/// name.
///
/// # Safety
/// `engine` and `concept` are NULL or were not freed; the text ends with NUL; `error` may be written, or is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_engine_name_concept(
    engine: *const Engine,
    name: *const c_char,
    concept: *const Named,
    error: *mut *mut Failure,
) -> Code {
    let work = || {
        // SAFETY: the caller's promise.
        let (engine, name) = unsafe { (object(engine, "engine")?, argument(name, "name")?) };
        let mut concepts = engine.concepts.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the caller's promise.
        match unsafe { concept.as_ref() } {
            Some(concept) => concepts.insert(name.into(), concept.concept.clone()),
            None => concepts.remove(name),
        };
        Ok(())
    };
    // SAFETY: the caller's promise.
    unsafe { call(error, work) }
}

/// Makes the pictures of a request: a JSON object with the fields of `respodiff serve`, of which "prompt" alone is
/// needed: "prompt" (a text or a list of texts), "negative_prompt", "n" (pictures of each prompt), "size" ("512x512")
/// or "width" and "height", "seed", "num_inference_steps", "guidance_scale", "sampler", "concepts" (["woman", {"name":
/// "old.safetensors", "weight": 0.8}]), "balance" (["woman", "man"], or a list of such lists), "loras" (adapters of
/// this request: files, names in "lora_folder", or {"name": "a", "weight": 0.8}), "prompt_syntax" ("plain", "a1111",
/// "comfy"), "clip_skip", and for SDXL "prompt_2" and "negative_prompt_2". A field that is not known is an error.
/// `progress` is NULL or called between steps, with `user`.
///
/// # Safety
/// `engine` is NULL or was not freed; the text ends with NUL; `result` and `error` may be written, or are NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_generate(
    engine: *const Engine,
    request: *const c_char,
    progress: Progress,
    user: *mut c_void,
    result: *mut *mut Pictures,
    error: *mut *mut Failure,
) -> Code {
    let work = || {
        // SAFETY: the caller's promise.
        let (result, engine, request) =
            unsafe { (place(result, "result")?, object(engine, "engine")?, argument(request, "request")?) };
        let request = Pipeline::parse(request.as_bytes())?;
        let mut tell = |done, total| match progress {
            // SAFETY: the caller's callback, with the caller's pointer, on the caller's thread.
            Some(progress) if unsafe { progress(user, done, total) } != 0 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        let Answer { pictures, warnings, .. } = engine.pipeline.generate(&request, engine, &mut tell)?;
        let kept = |made: Made| {
            let parameters = text(&made.info.json()?);
            Ok(Kept { made, parameters, png: OnceLock::new() })
        };
        let pictures = pictures.into_iter().map(kept).collect::<Result<_>>()?;
        let warnings = warnings.iter().map(|warning| text(warning)).collect();
        *result = Box::into_raw(Box::new(Pictures { pictures, warnings }));
        Ok(())
    };
    // SAFETY: the caller's promise.
    unsafe { call(error, work) }
}

/// A picture of a result.
///
/// # Safety
/// `result` is NULL or was not freed.
unsafe fn picture<'a>(result: *const Pictures, index: usize) -> Option<&'a Kept> {
    // SAFETY: the caller's promise.
    unsafe { result.as_ref() }?.pictures.get(index)
}

/// The number of pictures of a result; 0 for NULL.
///
/// # Safety
/// `result` is NULL or was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_result_count(result: *const Pictures) -> usize {
    // SAFETY: the caller's promise.
    unsafe { result.as_ref() }.map_or(0, |result| result.pictures.len())
}

/// The width of a picture; 0 if there is none.
///
/// # Safety
/// `result` is NULL or was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_result_width(result: *const Pictures, index: usize) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { picture(result, index) }.map_or(0, |kept| kept.made.picture.width)
}

/// The height of a picture; 0 if there is none.
///
/// # Safety
/// `result` is NULL or was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_result_height(result: *const Pictures, index: usize) -> u32 {
    // SAFETY: the caller's promise.
    unsafe { picture(result, index) }.map_or(0, |kept| kept.made.picture.height)
}

/// The seed of a picture; 0 if there is none.
///
/// # Safety
/// `result` is NULL or was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_result_seed(result: *const Pictures, index: usize) -> u64 {
    // SAFETY: the caller's promise.
    unsafe { picture(result, index) }.map_or(0, |kept| kept.made.info.seed)
}

/// The pixels of a picture, height * width * 3 bytes: rows from the top, pixels from the left, red, green, blue. NULL
/// if there is none.
///
/// # Safety
/// `result` is NULL or was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_result_pixels(result: *const Pictures, index: usize) -> *const u8 {
    // SAFETY: the caller's promise.
    unsafe { picture(result, index) }.map_or(null(), |kept| kept.made.picture.rgb.as_ptr())
}

/// Tells how a picture was made, with its concepts, by the JSON object that is in its file. NULL if there is none.
///
/// # Safety
/// `result` is NULL or was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_result_parameters(result: *const Pictures, index: usize) -> *const c_char {
    // SAFETY: the caller's promise.
    unsafe { picture(result, index) }.map_or(null(), |kept| kept.parameters.as_ptr())
}

/// The PNG file of a picture, byte for byte the one that `respodiff sample` writes. It is made when it is first asked
/// for.
///
/// # Safety
/// `result` is NULL or was not freed; `bytes`, `length` and `error` may be written, or are NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_result_png(
    result: *const Pictures,
    index: usize,
    bytes: *mut *const u8,
    length: *mut usize,
    error: *mut *mut Failure,
) -> Code {
    let work = || {
        // SAFETY: the caller's promise, for all.
        let place = unsafe { place(bytes.cast::<*mut u8>(), "bytes")? };
        if length.is_null() {
            return Err(invalid("length", "is NULL"));
        }
        // SAFETY: the caller's promise.
        let (result, kept) = unsafe { (object(result, "result")?, picture(result, index)) };
        let count = result.pictures.len();
        let Some(kept) = kept else {
            let problem = format!("there is no picture {index}; the result has {count}");
            return Err(respodiff::Error::new(
                respodiff::ErrorKind::Invalid,
                respodiff::Subject::Field("index"),
                problem,
            ));
        };
        let png = match kept.png.get() {
            Some(png) => png,
            None => {
                let png = kept.made.png()?;
                kept.png.get_or_init(|| png)
            }
        };
        *place = png.as_ptr().cast_mut();
        // SAFETY: the caller's promise.
        unsafe { length.write(png.len()) };
        Ok(())
    };
    // SAFETY: the caller's promise.
    unsafe { call(error, work) }
}

/// A warning about a request that was answered, such as words of a prompt that were too many; NULL after the last one.
///
/// # Safety
/// `result` is NULL or was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_result_warning(result: *const Pictures, index: usize) -> *const c_char {
    // SAFETY: the caller's promise.
    let warning = unsafe { result.as_ref() }.and_then(|result| result.warnings.get(index));
    warning.map_or(null(), |warning| warning.as_ptr())
}

/// Frees a result, and with it its pictures, files and texts.
///
/// # Safety
/// `result` is NULL or was not freed, and no other thread uses it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_result_free(result: *mut Pictures) {
    // SAFETY: the caller's promise.
    unsafe { free(result) };
}

// The header promises this of threads.
const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<Engine>();
    is_shared::<Named>();
    is_shared::<Pictures>();
};
