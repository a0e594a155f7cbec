//! Fencing tokens.

use std::fmt;
use std::num::NonZeroI64;
use std::str::FromStr;

use crate::{Error, Result, Revision};

/// How many bits of a token are the revision's alone, as long as the revision is smaller than that.
const EPOCH_SHIFT: u32 = 32;

/// A fencing token: larger than that of every earlier holder of the same lock, or leader of the same election.
///
/// It is a positive number that fits a signed 64-bit integer, such as SQL's `BIGINT` and Java's `long`. In JSON it is a
/// string, since programs that hold numbers as doubles would round it. Tokens of one namespace can be compared, those of
/// two can't.
///
/// A token is the sum of the namespace's epoch, shifted by 32 bits, and the revision at which the contender entered the
/// queue. Within one store revisions grow, and with them tokens. The epoch is raised when the namespace moves to another
/// store or its store is restored from a copy, whose revisions begin lower; see [`crate::recipe::Epoch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Token(NonZeroI64);

impl Token {
    /// The token of that number.
    ///
    /// # Errors
    /// [`TokenError`] if it is not positive.
    pub fn new(number: i64) -> Result<Self, TokenError> {
        match NonZeroI64::new(number).filter(|number| number.is_positive()) {
            Some(number) => Ok(Self(number)),
            None => Err(TokenError),
        }
    }

    /// The number, which is positive.
    pub fn get(self) -> i64 {
        self.0.get()
    }

    /// The token of a contender that entered a queue at a revision, in an epoch.
    ///
    /// # Errors
    /// [`Error::TokenOverflow`] if the sum is larger than a token can be.
    pub(crate) fn of(epoch: u32, revision: Revision) -> Result<Self> {
        let sum = (i64::from(epoch) << EPOCH_SHIFT).checked_add_unsigned(revision.0);
        let token = sum.and_then(|sum| Self::new(sum).ok());
        token.ok_or(Error::TokenOverflow { epoch, revision })
    }

    /// The first epoch all of whose tokens are larger than this one.
    pub(crate) fn next_epoch(self) -> u32 {
        // At most 2^31, as the token is positive.
        u32::try_from((self.get() >> EPOCH_SHIFT) + 1).unwrap_or(u32::MAX)
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        // Plain digits only: each token has one form.
        let plain = !text.starts_with(['+', '0']);
        let number = text.parse().ok().filter(|_| plain).ok_or(TokenError)?;
        Self::new(number)
    }
}

impl TryFrom<String> for Token {
    type Error = TokenError;

    fn try_from(text: String) -> Result<Self, TokenError> {
        text.parse()
    }
}

impl From<Token> for String {
    fn from(token: Token) -> Self {
        token.to_string()
    }
}

impl From<Token> for i64 {
    fn from(token: Token) -> Self {
        token.get()
    }
}

/// What was given is no fencing token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a fencing token is a decimal number from 1 to 9223372036854775807")]
pub struct TokenError;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(epoch: u32, revision: u64) -> Token {
        Token::of(epoch, Revision(revision)).expect("it is in the range")
    }

    proptest! {
        /// Whatever the revisions of two stores are: the epoch that is raised above a token exceeds it.
        #[test]
        fn a_raised_epoch_exceeds_every_token_before(epoch in 0..1_u32 << 20, last in 1..1_u64 << 60, first in 0..1_u64 << 60) {
            let before = of(epoch, last);
            // The new store's revisions may begin at 0.
            for first in [0, first] {
                prop_assert!(of(before.next_epoch(), first) > before);
            }
        }

        /// Revisions of one store grow, epochs too, and a large revision carries into the epoch's bits without harm.
        #[test]
        fn tokens_grow_with_epoch_and_revision(epoch in 0..1_u32 << 20, revision in 1..1_u64 << 60, by in 1..1_u64 << 40, epochs in 0..3_u32) {
            prop_assert!(of(epoch + epochs, revision + by) > of(epoch, revision));
        }

        #[test]
        fn a_token_prints_and_reads_back(number in 1..=i64::MAX) {
            let token = Token::new(number).expect("it is positive");
            prop_assert_eq!(token.to_string(), number.to_string());
            prop_assert_eq!(token.to_string().parse(), Ok(token));
        }
    }

    #[test]
    fn an_overflow_is_an_error() {
        assert_eq!(of(0, i64::MAX as u64).get(), i64::MAX);
        for (epoch, revision) in [
            (0, 0),
            (0, 1 << 63),
            (1, i64::MAX as u64),
            (1 << 31, 1),
            (u32::MAX, u64::MAX),
        ] {
            let overflow = Token::of(epoch, Revision(revision));
            assert!(
                matches!(overflow, Err(Error::TokenOverflow { .. })),
                "{epoch} {revision}: {overflow:?}"
            );
        }
    }

    #[test]
    fn what_is_no_token_is_refused() {
        for text in ["", "0", "-1", "+1", "01", "1.0", "1 ", "0x1", "9223372036854775808"] {
            assert_eq!(text.parse::<Token>(), Err(TokenError), "{text:?}");
        }
    }
}
