//! Errors as C sees them, and the wall that no panic passes.

use respodiff::{Error, ErrorKind, Subject};
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null;

/// The kinds of failure. More may come.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// It worked.
    Ok = 0,
    /// A value that can never work as it was given, or NULL, or text that is not UTF-8.
    Invalid = 1,
    /// A file, folder, model, concept or device that is not there.
    NotFound = 2,
    /// A file that is not what it should be.
    Damaged = 3,
    /// Something whole and valid that this library, build or device cannot do.
    Unsupported = 4,
    /// Two things that do not belong together, such as a concept and a model of another width.
    Mismatch = 5,
    /// More memory than there is. A smaller picture or batch may work.
    OutOfMemory = 6,
    /// The operating system refused to read or write.
    Io = 7,
    /// The model server is out of reach or refuses. It may work later.
    Network = 8,
    /// A computation produced NaN or infinity. No picture is made of it.
    NonFinite = 9,
    /// The device failed during its work. Open the engine again.
    DeviceLost = 10,
    /// The callback asked for the end.
    Cancelled = 11,
    /// A fault of the library.
    Internal = 12,
}

impl From<ErrorKind> for Code {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Invalid => Code::Invalid,
            ErrorKind::NotFound => Code::NotFound,
            ErrorKind::Damaged => Code::Damaged,
            ErrorKind::Unsupported => Code::Unsupported,
            ErrorKind::Mismatch => Code::Mismatch,
            ErrorKind::OutOfMemory => Code::OutOfMemory,
            ErrorKind::Io => Code::Io,
            ErrorKind::Network => Code::Network,
            ErrorKind::NonFinite => Code::NonFinite,
            ErrorKind::DeviceLost => Code::DeviceLost,
            ErrorKind::Cancelled => Code::Cancelled,
            _ => Code::Internal,
        }
    }
}

/// A failure.
pub struct Failure {
    code: Code,
    message: CString,
    subject: CString,
    advice: Option<CString>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure {
            code: error.kind().into(),
            message: text(&error.to_string()),
            subject: text(&error.subject().to_string()),
            advice: error.advice().map(text),
        }
    }
}

/// A text for C, which ends where C would end it.
pub fn text(text: &str) -> CString {
    let end = text.find('\0').unwrap_or(text.len());
    CString::new(&text[..end]).unwrap_or_default()
}

/// An argument that can never work.
pub fn invalid(argument: &'static str, problem: &'static str) -> Error {
    Error::new(ErrorKind::Invalid, Subject::Field(argument), problem)
}

/// Does the work of a call: an error and a panic become its code, and the error's text goes to `error`.
///
/// # Safety
/// `error` is NULL or may be written.
pub unsafe fn call(error: *mut *mut Failure, work: impl FnOnce() -> Result<(), Error>) -> Code {
    if !error.is_null() {
        // SAFETY: the caller's promise.
        unsafe { error.write(std::ptr::null_mut()) };
    }
    // The state that a panic leaves behind is either local to the call or, as the engine's own locks, safe to use after
    // one.
    let outcome = catch_unwind(AssertUnwindSafe(work));
    let failure = match outcome {
        Ok(Ok(())) => return Code::Ok,
        Ok(Err(problem)) => Failure::from(problem),
        Err(panic) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic");
            let problem = Error::new(ErrorKind::Internal, Subject::Run, said.to_string());
            problem.advise("this is a fault of respodiff; please report it").into()
        }
    };
    let code = failure.code;
    if !error.is_null() {
        // SAFETY: the caller's promise.
        unsafe { error.write(Box::into_raw(Box::new(failure))) };
    }
    code
}

/// The kind of an error; RESPODIFF_CODE_OK for NULL.
///
/// # Safety
/// `error` is NULL or an error that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_error_code(error: *const Failure) -> Code {
    // SAFETY: the caller's promise.
    unsafe { error.as_ref() }.map_or(Code::Ok, |failure| failure.code)
}

/// An error in one line: what it is about, what is wrong, what to do. NULL for NULL.
///
/// # Safety
/// `error` is NULL or an error that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_error_message(error: *const Failure) -> *const c_char {
    // SAFETY: the caller's promise.
    unsafe { error.as_ref() }.map_or(null(), |failure| failure.message.as_ptr())
}

/// Names the field of the request, the argument, the file or the model that an error is about; empty if it is nothing
/// in particular. NULL for NULL.
///
/// # Safety
/// `error` is NULL or an error that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_error_subject(error: *const Failure) -> *const c_char {
    // SAFETY: the caller's promise.
    unsafe { error.as_ref() }.map_or(null(), |failure| failure.subject.as_ptr())
}

/// Tells what to do about an error; NULL if there is nothing to tell.
///
/// # Safety
/// `error` is NULL or an error that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_error_advice(error: *const Failure) -> *const c_char {
    // SAFETY: the caller's promise.
    unsafe { error.as_ref() }.and_then(|failure| failure.advice.as_ref()).map_or(null(), |advice| advice.as_ptr())
}

/// Frees an error.
///
/// # Safety
/// `error` is NULL or an error that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn respodiff_error_free(error: *mut Failure) {
    if !error.is_null() {
        // SAFETY: the caller's promise; it came from `Box::into_raw`.
        drop(unsafe { Box::from_raw(error) });
    }
}
