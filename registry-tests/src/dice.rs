//! Chance that can be repeated.

use std::time::Duration;

/// Random numbers that a seed repeats (Steele, Lea and Flood, *SplitMix*, 2014).
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// A number below `sides`.
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    /// An index below `len`, which is not zero.
    pub fn pick(&mut self, len: usize) -> usize {
        usize::try_from(self.roll(len as u64)).expect("it is below a usize")
    }

    /// A time up to `most`.
    pub fn time(&mut self, most: Duration) -> Duration {
        most.mul_f64(self.roll(1001) as f64 / 1000.0)
    }

    /// Another source of chance, to be used beside this one.
    pub fn split(&mut self) -> Self {
        Self(self.roll(u64::MAX))
    }
}
