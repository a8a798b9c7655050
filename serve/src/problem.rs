//! Problems as HTTP answers, in the form of OpenAI's errors on every route.

use crate::backend::{Kind, Problem};
use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

impl Kind {
    /// The HTTP status, and OpenAI's type and code of the error.
    fn answer(self) -> (StatusCode, &'static str, &'static str) {
        const REQUEST: &str = "invalid_request_error";
        match self {
            Kind::Invalid => (StatusCode::BAD_REQUEST, REQUEST, "invalid_value"),
            Kind::Unauthorized => (StatusCode::UNAUTHORIZED, REQUEST, "invalid_api_key"),
            Kind::NotFound => (StatusCode::NOT_FOUND, REQUEST, "not_found"),
            Kind::Cancelled => (StatusCode::REQUEST_TIMEOUT, "timeout_error", "cancelled"),
            Kind::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, REQUEST, "too_large"),
            Kind::Impossible => (StatusCode::UNPROCESSABLE_ENTITY, REQUEST, "does_not_fit"),
            Kind::Conflict => (StatusCode::CONFLICT, REQUEST, "idempotency_key_reused"),
            Kind::Busy => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full"),
            Kind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "server_error", "internal"),
            Kind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "server_error", "unavailable"),
        }
    }
}

impl Problem {
    /// OpenAI's error object.
    pub(crate) fn json(&self) -> serde_json::Value {
        let (_, kind, code) = self.kind.answer();
        json!({"error": {"message": self.message, "type": kind, "param": self.field, "code": code}})
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, ..) = self.kind.answer();
        let mut response = (status, Json(self.json())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<BytesRejection> for Problem {
    fn from(rejection: BytesRejection) -> Self {
        match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Problem::new(Kind::TooLarge, "the body is too large; send a smaller one"),
            _ => Problem::new(Kind::Invalid, rejection.body_text()),
        }
    }
}
