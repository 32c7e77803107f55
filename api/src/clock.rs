//! Wall-clock time as the protocols write it.

use std::sync::OnceLock;
use std::time::Instant;

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// Now, milliseconds since the Unix epoch.
#[must_use]
pub fn unix_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

/// Milliseconds since the Unix epoch by a clock that is never set while this process lives: the wall clock when it was first
/// asked, and the time since. For what is due or has an age.
#[must_use]
pub fn steady_unix_ms() -> i64 {
    let (began, at) = BEGAN.get_or_init(|| (unix_ms(), Instant::now()));
    began.saturating_add(i64::try_from(at.elapsed().as_millis()).unwrap_or(i64::MAX))
}

/// How long ago that moment of [`steady_unix_ms`] was, milliseconds, as far as this process has lived since: between its life and the
/// last one's the wall clock may have been set, and nothing could be done about what waits.
#[must_use]
pub fn lived_since(unix_ms: i64) -> i64 {
    let now = steady_unix_ms();
    let (began, _) = BEGAN.get_or_init(|| (now, Instant::now()));
    now.saturating_sub(unix_ms.max(*began))
}

static BEGAN: OnceLock<(i64, Instant)> = OnceLock::new();

/// Seconds since the Unix epoch, as service models write time stamps.
#[must_use]
pub fn seconds(unix_ms: i64) -> f64 {
    let (seconds, milliseconds) = (unix_ms.div_euclid(1000), unix_ms.rem_euclid(1000));
    let wide = |value: i64| f64::from(i32::try_from(value).unwrap_or(i32::MAX));
    wide(seconds) + wide(milliseconds) / 1000.0
}

/// `2026-11-23T13:27:09.123+0000`, as Lambda writes `LastModified`.
#[must_use]
pub fn last_modified(unix_ms: i64) -> String {
    format(unix_ms, "%Y-%m-%dT%H:%M:%S%.3f+0000")
}

/// `2026-11-23T13:27:09.123Z`, as Lambda writes into logs.
#[must_use]
pub fn log_stamp(unix_ms: i64) -> String {
    format(unix_ms, "%Y-%m-%dT%H:%M:%S%.3fZ")
}

/// `23/Nov/2026:13:27:09 +0000`, as function URLs write `requestContext.time`.
#[must_use]
pub fn common_log(unix_ms: i64) -> String {
    format(unix_ms, "%d/%b/%Y:%H:%M:%S +0000")
}

/// `2026/11/23`, as log streams are named.
#[must_use]
pub fn day(unix_ms: i64) -> String {
    format(unix_ms, "%Y/%m/%d")
}

fn format(unix_ms: i64, pattern: &str) -> String {
    // Times come from this machine's clock; one beyond jiff's range (year 9999) is shown as the epoch.
    let time = Timestamp::from_millisecond(unix_ms).unwrap_or(Timestamp::UNIX_EPOCH);
    time.to_zoned(TimeZone::UTC).strftime(pattern).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_an_earlier_life_is_as_old_as_this_one() {
        let day = 24 * 60 * 60 * 1000;
        let before = steady_unix_ms() - day;
        assert!(lived_since(before) < day, "the clock was set forward");
        assert!(lived_since(steady_unix_ms() + day) < 0, "and back");
    }

    #[test]
    fn times_are_written_as_lambda_writes_them() {
        let time = 1_795_440_429_007;
        assert_eq!(last_modified(time), "2026-11-23T13:27:09.007+0000");
        assert_eq!(log_stamp(time), "2026-11-23T13:27:09.007Z");
        assert_eq!(common_log(time), "23/Nov/2026:13:27:09 +0000");
        assert_eq!(day(time), "2026/11/23");
        assert!((seconds(time) - 1_795_440_429.007).abs() < 1e-6);
        assert_eq!(last_modified(i64::MAX), "1970-01-01T00:00:00.000+0000");
    }
}
