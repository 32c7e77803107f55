//! The time of a signature, `20150830T123600Z`.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

/// A time, to the second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    text: String,
    unix_seconds: i64,
}

impl Stamp {
    /// Reads ISO-8601's basic form, exactly.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        let shape = bytes.len() == 16
            && bytes.iter().enumerate().all(|(index, byte)| match index {
                8 => *byte == b'T',
                15 => *byte == b'Z',
                _ => byte.is_ascii_digit(),
            });
        let number = |from: usize, to: usize| text.get(from..to)?.parse::<i8>().ok();
        let year = text.get(..4).filter(|_| shape)?.parse::<i16>().ok()?;
        let time = DateTime::new(
            year,
            number(4, 6)?,
            number(6, 8)?,
            number(9, 11)?,
            number(11, 13)?,
            number(13, 15)?,
            0,
        )
        .ok()?;
        let zoned = time.to_zoned(TimeZone::UTC).ok()?;
        Some(Self {
            text: text.to_owned(),
            unix_seconds: zoned.timestamp().as_second(),
        })
    }

    /// Reads an HTTP date, or the basic form.
    #[must_use]
    pub fn parse_date_header(text: &str) -> Option<Self> {
        if let Some(stamp) = Self::parse(text) {
            return Some(stamp);
        }
        let zoned = jiff::fmt::rfc2822::parse(text).ok()?;
        Some(Self::at(zoned.timestamp().as_second()))
    }

    /// A time by its Unix seconds; one beyond the calendar is shown as the epoch.
    #[must_use]
    pub fn at(unix_seconds: i64) -> Self {
        let time = Timestamp::from_second(unix_seconds).unwrap_or(Timestamp::UNIX_EPOCH);
        Self {
            text: time
                .to_zoned(TimeZone::UTC)
                .strftime("%Y%m%dT%H%M%SZ")
                .to_string(),
            unix_seconds: time.as_second(),
        }
    }

    /// As it is written.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its day, `20150830`.
    #[must_use]
    pub fn date(&self) -> &str {
        self.text.get(..8).unwrap_or_default()
    }

    /// Seconds since the Unix epoch.
    #[must_use]
    pub fn unix_seconds(&self) -> i64 {
        self.unix_seconds
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn times_are_read_exactly() {
        let stamp = Stamp::parse("20150830T123600Z").unwrap();
        assert_eq!(stamp.unix_seconds(), 1_440_938_160);
        assert_eq!(stamp.date(), "20150830");
        assert_eq!(Stamp::at(1_440_938_160), stamp);
        let header = Stamp::parse_date_header("Sun, 30 Aug 2015 12:36:00 GMT").unwrap();
        assert_eq!(header, stamp);
        for text in [
            "",
            "20150830",
            "20150830T123600",
            "2015-08-30T12:36:00Z",
            "20151330T123600Z",
            "20150830t123600Z",
            "+0150830T123600Z",
            "20150830T1236é0Z",
        ] {
            assert!(Stamp::parse(text).is_none(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,20}") {
            let _ = Stamp::parse_date_header(&text);
        }
    }
}
