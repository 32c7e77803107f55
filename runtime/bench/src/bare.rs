//! One client that costs next to nothing: a connection, a request written ahead, an answer read. What it waits is the
//! gateway's and the monitor's time; a full HTTP client's own share is as large as theirs.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

use crate::stats::Series;

/// Largest head and body of an answer, bytes.
const ANSWER_BYTES_MAX: usize = 16 * 1024;
/// Longest wait for an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Sends so many requests one after the other; what each took, by the start of its sandbox.
///
/// # Errors
/// An answer that is not 200 with `body` in it, or none.
pub fn run(address: &str, path: &str, body: &str, requests: u32) -> anyhow::Result<Series> {
    let mut stream = TcpStream::connect(address).context("cannot connect to the gateway")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    let (mut series, mut buffer) = (Series::default(), vec![0; ANSWER_BYTES_MAX]);
    for _ in 0..requests {
        let began = Instant::now();
        stream.write_all(request.as_bytes())?;
        let mut filled = 0;
        let answer = loop {
            let count = stream.read(&mut buffer[filled..])?;
            ensure!(count > 0, "the gateway closed the connection");
            filled += count;
            if let Some(answer) = whole(&buffer[..filled]) {
                break answer;
            }
        };
        let took = began.elapsed();
        ensure!(
            answer.is_good && answer.body == body.as_bytes(),
            "bad answer: {}",
            String::from_utf8_lossy(&buffer[..filled])
        );
        series.add(answer.start, took);
    }
    Ok(series)
}

#[derive(Debug, PartialEq, Eq)]
struct Answer<'a> {
    is_good: bool,
    start: &'a str,
    body: &'a [u8],
}

/// The answer, once all of it is there.
fn whole(bytes: &[u8]) -> Option<Answer<'_>> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    let head = str::from_utf8(&bytes[..end]).ok()?;
    let header = |name: &str| {
        let mut fields = head
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(": "));
        fields.find_map(|(found, value)| found.eq_ignore_ascii_case(name).then_some(value))
    };
    let length: usize = header("content-length")?.parse().ok()?;
    let body = bytes.get(end + 4..)?.get(..length)?;
    Some(Answer {
        is_good: head.starts_with("HTTP/1.1 200 "),
        start: header("x-thaw-start").unwrap_or("untold"),
        body,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_with_the_last_byte_of_its_body() {
        let bytes = b"HTTP/1.1 200 OK\r\nX-Thaw-Start: rewound\r\ncontent-length: 2\r\n\r\n{}";
        let answer = Answer {
            is_good: true,
            start: "rewound",
            body: b"{}",
        };
        assert_eq!(whole(bytes), Some(answer));
        for cut in 0..bytes.len() {
            assert_eq!(whole(&bytes[..cut]), None);
        }
    }
}
