//! The word that whoever asks has to say, where `token_file` is set.

use std::net::SocketAddr;
use std::path::Path;

use registry_api::Result;
use subtle::ConstantTimeEq;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

use super::tls::contents;
use crate::config::refused;

const SHORTEST: usize = 16;
const LONGEST: usize = 4096;
const SCHEME: &[u8] = b"Bearer ";

/// A bearer token, as a header says it (RFC 6750). `Debug` does not show it.
#[derive(Clone)]
pub(super) struct Token(MetadataValue<Ascii>);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").finish_non_exhaustive()
    }
}

impl Token {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let bytes = contents("token_file", path)?;
        let token = bytes.trim_ascii();
        // What is wrong with it is told without repeating any of it.
        let wrong = || {
            let reason = format!("a token is {SHORTEST} to {LONGEST} letters, digits and signs of ASCII on one line");
            refused("token_file", format!("{}: {reason}", path.display()))
        };
        if !(SHORTEST..=LONGEST).contains(&token.len()) || !token.iter().all(u8::is_ascii_graphic) {
            return Err(wrong());
        }
        let mut header: MetadataValue<Ascii> = [SCHEME, token].concat().try_into().map_err(|_| wrong())?;
        header.set_sensitive(true);
        Ok(Self(header))
    }

    /// Whether that is it, in a time that does not tell how much of it is right. The word before it may be written as the
    /// sender likes (RFC 9110, section 11.1).
    fn is_said_by(&self, header: &[u8]) -> bool {
        let scheme = header.get(..SCHEME.len()).unwrap_or_default();
        let said = header.get(SCHEME.len()..).unwrap_or_default();
        scheme.eq_ignore_ascii_case(SCHEME) && bool::from(self.0.as_encoded_bytes()[SCHEME.len()..].ct_eq(said))
    }
}

/// Says the token with each request.
#[derive(Clone, Debug)]
pub(crate) struct Say(pub(super) Option<Token>);

impl Interceptor for Say {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.0.clone());
        }
        Ok(request)
    }
}

/// Demands the token of each request, if there is one. A refusal is logged, and not what was said.
#[derive(Clone, Debug)]
pub(super) struct Demand(pub(super) Option<Token>);

impl Demand {
    /// Whether a request from there with this `Authorization` header may be looked at.
    ///
    /// # Errors
    /// Why not, for who asked.
    pub(super) fn check(&self, from: Option<SocketAddr>, authorization: Option<&[u8]>) -> Result<(), &'static str> {
        let why = match (&self.0, authorization) {
            (None, _) => return Ok(()),
            (Some(token), Some(said)) if token.is_said_by(said) => return Ok(()),
            (Some(_), Some(_)) => "the token is not this group's",
            (Some(_), None) => "a token is asked for: set registry.raft.token_file",
        };
        tracing::warn!(from = from.map(tracing::field::display), why, "a request was refused");
        Err(why)
    }
}

impl Interceptor for Demand {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let said = request.metadata().get("authorization");
        let checked = self.check(request.remote_addr(), said.map(MetadataValue::as_encoded_bytes));
        checked.map(|()| request).map_err(Status::unauthenticated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_compared_whole_and_never_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        std::fs::write(&path, "  0123456789abcdef\n").unwrap();
        let token = Token::read(&path).unwrap();
        let is = |said: &str| token.is_said_by(said.as_bytes());
        assert!(is("Bearer 0123456789abcdef"));
        for wrong in [
            "",
            "Bearer",
            "0123456789abcdef",
            "Bearer 0123456789abcde",
            "Bearer 0123456789abcdeF",
        ] {
            assert!(!is(wrong), "{wrong:?} was taken");
        }
        let mut request = Request::new(());
        request = Say(Some(token.clone())).call(request).unwrap();
        for shown in [
            format!("{token:?}"),
            format!("{:?}", Say(Some(token))),
            format!("{request:?}"),
        ] {
            assert!(!shown.contains("0123456789"), "{shown}");
        }
    }
}
