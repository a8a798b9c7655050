//! Requests for pictures as fields of a JSON object. respodiff's server and its bindings to C and Python take the same
//! fields, and refuse the same mistakes in the same words.

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod object;
mod request;

pub use object::{Fields, Wrong};
pub use request::Request;
