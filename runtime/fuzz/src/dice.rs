//! Random numbers from a seed, the same on every machine and in every version.

use std::collections::BTreeSet;
use std::time::Duration;

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
#[derive(Debug)]
pub struct Dice {
    seed: u64,
    state: u64,
    is_told: bool,
    seen: BTreeSet<String>,
}

impl Dice {
    /// Dice that show the same numbers for the same seed.
    pub fn from_seed(seed: u64) -> Self {
        Self::new(seed, false)
    }

    pub(crate) fn new(seed: u64, is_told: bool) -> Self {
        Self {
            seed,
            state: seed,
            is_told,
            seen: BTreeSet::new(),
        }
    }

    /// What all of it follows from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// One seed is played again, for somebody who reads what happens.
    pub fn is_told(&self) -> bool {
        self.is_told
    }

    /// Notes that something happened that a campaign must have gone through.
    pub fn saw(&mut self, what: impl Into<String>) {
        self.seen.insert(what.into());
    }

    pub(crate) fn seen(self) -> BTreeSet<String> {
        self.seen
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Both ends included.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        match (high - low).checked_add(1) {
            Some(width) => low + self.any() % width,
            None => self.any(),
        }
    }

    /// True as often as `chance` in a thousand.
    pub fn in_thousand(&mut self, chance: u64) -> bool {
        self.range(0, 999) < chance
    }

    /// One of several.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.index(of.len())]
    }

    /// An index into something of `length` elements, which is not empty.
    pub fn index(&mut self, length: usize) -> usize {
        let last = length as u64 - 1;
        usize::try_from(self.range(0, last)).expect("an index")
    }

    /// A time, both ends included.
    pub fn microseconds(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_micros(self.range(low, high))
    }

    /// A number at which arithmetic of `bits` bits goes wrong, or any.
    pub fn edge(&mut self, bits: u32) -> u64 {
        let all = u64::MAX >> (64 - bits);
        let power = 1u64 << self.range(0, u64::from(bits) - 1);
        let number = match self.range(0, 7) {
            0 => 0,
            1 => all,
            2 => power,
            3 => power.wrapping_sub(1),
            4 => power.wrapping_neg(),
            5 => self.range(0, 64),
            6 => all - self.range(0, 64).min(all),
            _ => self.any(),
        };
        number & all
    }

    /// `length` bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let words = std::iter::repeat_with(|| self.any().to_le_bytes());
        words
            .take(length.div_ceil(8))
            .flatten()
            .take(length)
            .collect()
    }

    /// Spoils `bytes` in one way: a bit, a byte, a number of 2, 4 or 8 bytes, a cut, a piece that is doubled, random bytes.
    pub fn spoil(&mut self, bytes: &mut Vec<u8>) {
        if bytes.is_empty() {
            let length = self.index(64);
            bytes.extend(self.bytes(length));
            return;
        }
        let at = self.index(bytes.len());
        match self.range(0, 7) {
            0 => bytes[at] ^= 1 << self.range(0, 7),
            1 => bytes[at] = self.any().to_le_bytes()[0],
            2..=4 => {
                let width = *self.pick(&[2, 4, 8]);
                let number = self.edge(64).to_le_bytes();
                let end = bytes.len().min(at + width);
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            5 => bytes.truncate(at),
            6 => {
                let end = at + self.index((bytes.len() - at).min(256));
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let length = self.index(32);
                let noise = self.bytes(length);
                bytes.splice(at..at, noise);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_numbers_it_always_gave() {
        let mut dice = Dice::new(0, false);
        // The algorithm's own first numbers for the seed 0.
        assert_eq!(
            [dice.any(), dice.any()],
            [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]
        );
    }

    #[test]
    fn numbers_stay_within_their_bounds_and_reach_both_ends() {
        let mut dice = Dice::new(1, false);
        let drawn: BTreeSet<u64> = (0..1000).map(|_| dice.range(5, 8)).collect();
        assert_eq!(drawn, BTreeSet::from([5, 6, 7, 8]));
        assert!((0..1000).all(|_| dice.edge(16) <= 0xffff));
        assert_eq!(dice.bytes(13).len(), 13);
    }
}
