//! Chance that can be repeated.

use std::time::Duration;

/// Random numbers that a seed repeats (Steele, Lea and Flood, *SplitMix*, 2014).
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// Dice whose seed is printed.
    pub fn of_run() -> Self {
        let seed = Self::seed_of_run();
        println!("REGISTRY_SEED={seed} repeats it");
        Self(seed)
    }

    /// The seed that was asked for, or another in each process.
    pub fn seed_of_run() -> u64 {
        Self::seed_asked_for().unwrap_or_else(|| std::process::id().into())
    }

    /// `REGISTRY_SEED` of the environment.
    pub fn seed_asked_for() -> Option<u64> {
        std::env::var("REGISTRY_SEED").ok()?.parse().ok()
    }

    /// How often something random is tried: so often, or as many times that as `REGISTRY_TIMES` of the environment says.
    pub fn tries(usual: u64) -> u64 {
        let times = std::env::var("REGISTRY_TIMES").ok();
        usual * times.map_or(1, |times| times.parse().expect("REGISTRY_TIMES is a number"))
    }

    /// Hands on what is good, which must be taken, and damaged ones of it, so many as [`Dice::tries`] has it, of which some
    /// must be refused; `take` says which it was.
    ///
    /// With `REGISTRY_CORPUS` in the environment it writes what is good to that directory, for a fuzzer to begin with.
    ///
    /// # Panics
    /// If that is not so.
    pub fn damage_each(good: &[Vec<u8>], tries: u64, take: impl Fn(&[u8]) -> bool) {
        for (at, good) in good.iter().enumerate() {
            assert!(take(good), "what is good was refused: {at}");
            if let Ok(corpus) = std::env::var("REGISTRY_CORPUS") {
                std::fs::write(format!("{corpus}/good-{at}"), good).expect("REGISTRY_CORPUS is a directory");
            }
        }
        let mut dice = Self::of_run();
        let tries = Self::tries(tries);
        let mut damaged = || {
            let one = dice.pick(good.len());
            dice.damage(&good[one])
        };
        let taken = (0..tries).filter(|_| take(&damaged())).count() as u64;
        println!("{tries} were damaged, {taken} of them were taken");
        assert!(taken < tries, "the damage damages nothing");
    }

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

    /// The bytes with something wrong: flipped, lost, doubled, cut off, or made up.
    pub fn damage(&mut self, good: &[u8]) -> Vec<u8> {
        let mut bad = good.to_vec();
        for _ in 0..=self.roll(3) {
            let at = self.roll(bad.len() as u64 + 1) as usize;
            let end = bad.len().min(at + self.roll(9) as usize);
            let put: Vec<u8> = match self.roll(6) {
                0 => bad[at..end].iter().map(|byte| byte ^ (1 << self.roll(8))).collect(),
                1 => Vec::new(),
                2 => bad[at..end].repeat(2),
                3 => {
                    bad.truncate(at);
                    continue;
                }
                4 => (0..self.roll(9)).map(|_| self.roll(256) as u8).collect(),
                // The largest of lengths and numbers.
                _ => vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            };
            bad.splice(at..end, put);
        }
        bad
    }
}
