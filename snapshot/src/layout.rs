//! The header: fixed little-endian bytes outside any encoding, checked in full before anything else is read.

use thiserror::Error;

use crate::Digest;
use crate::difference::BASE_BYTES;
use crate::working_set::{TOUCHED_BYTES, WORKING_SET_RUNS_MAX};

/// Version of the format that this crate writes, and the only one it reads.
pub const FORMAT_VERSION: u32 = 2;
/// Sections start at multiples of this, so that memory can be mapped straight from the file.
pub const PAGE_BYTES: u64 = 4096;
/// Most sections in a file: what fits the header's page.
pub const SECTION_COUNT_MAX: usize = 60;
/// Longest file, bytes: 1 TiB, far above the largest VM with its disks.
pub const FILE_BYTES_MAX: u64 = 1 << 40;

pub(crate) const HEADER_PAGE_BYTES: usize = 4096;
const MAGIC: [u8; 8] = *b"THAWSNAP";
const FIXED_BYTES: usize = 32;
const ENTRY_BYTES: usize = 64;
const DIGEST_BYTES: usize = 32;
/// Length of the authentication tag, which ends the header's page.
pub(crate) const TAG_BYTES: usize = 32;
/// Where the tag stands: outside of what the header's digest covers, which it is made of.
pub(crate) const TAG_OFFSET: u64 = (HEADER_PAGE_BYTES - TAG_BYTES) as u64;
const FLAG_REQUIRED: u32 = 1;
const FLAG_SPARSE: u32 = 2;

// A header of the most sections must fit before the tag.
const _: () = assert!(header_end(SECTION_COUNT_MAX) <= TAG_OFFSET);
// Raising the version is a decision: the golden file must change with it.
const _: () = assert!(FORMAT_VERSION == 2);

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SectionKind {
    /// JSON: what this is a snapshot of.
    Metadata,
    /// CPU features of the guest.
    Cpu,
    /// vCPU, interrupt chip, clock and device state; encoded by the monitor.
    Machine,
    /// Which pages a guest touches first; optional.
    WorkingSet,
    /// Which snapshot's memory lies below this one's.
    Base,
    /// Guest memory; sparse.
    Memory,
    /// The page runs of [`SectionKind::Memory`] that are not zero.
    MemoryRuns,
    /// Content of the n-th disk; sparse.
    Disk(u8),
    /// The page runs of [`SectionKind::Disk`] that are not zero.
    DiskRuns(u8),
    /// A kind of a later version, which this one may pass over.
    Unknown(u32),
}

const DISK: u32 = 0x100;
const DISK_RUNS: u32 = 0x200;

impl SectionKind {
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Metadata => 1,
            Self::Cpu => 2,
            Self::Machine => 3,
            Self::WorkingSet => 4,
            Self::Base => 5,
            Self::Memory => 0x10,
            Self::MemoryRuns => 0x11,
            Self::Disk(index) => DISK + u32::from(index),
            Self::DiskRuns(index) => DISK_RUNS + u32::from(index),
            Self::Unknown(number) => number,
        }
    }

    fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Metadata,
            2 => Self::Cpu,
            3 => Self::Machine,
            4 => Self::WorkingSet,
            5 => Self::Base,
            0x10 => Self::Memory,
            0x11 => Self::MemoryRuns,
            _ => {
                let [low, high, ..] = number.to_le_bytes();
                match (number & !0xff, high) {
                    (DISK, _) => Self::Disk(low),
                    (DISK_RUNS, _) => Self::DiskRuns(low),
                    _ => Self::Unknown(number),
                }
            }
        }
    }

    /// Where a sparse section's runs are; `None` for a section that is not sparse.
    pub(crate) fn runs_kind(self) -> Option<Self> {
        match self {
            Self::Memory => Some(Self::MemoryRuns),
            Self::Disk(index) => Some(Self::DiskRuns(index)),
            _ => None,
        }
    }

    /// The section without which this one makes no sense.
    fn companion(self) -> Option<Self> {
        match self {
            Self::Memory => Some(Self::MemoryRuns),
            Self::Disk(index) => Some(Self::DiskRuns(index)),
            Self::DiskRuns(index) => Some(Self::Disk(index)),
            Self::MemoryRuns | Self::WorkingSet | Self::Base => Some(Self::Memory),
            Self::Metadata | Self::Cpu | Self::Machine | Self::Unknown(_) => None,
        }
    }

    /// Longest section that is read into memory, bytes.
    pub(crate) fn bytes_max(self) -> u64 {
        match self {
            Self::Metadata | Self::Cpu => 1 << 20,
            // Four vCPUs of 64 KiB each and the agent channel's bytes are half of it; decoded, a hostile one takes
            // some thirty times its length.
            Self::Machine => 2 << 20,
            Self::WorkingSet => (WORKING_SET_RUNS_MAX * TOUCHED_BYTES) as u64,
            Self::Base => BASE_BYTES as u64,
            Self::MemoryRuns | Self::DiskRuns(_) => 64 << 20,
            Self::Memory | Self::Disk(_) | Self::Unknown(_) => FILE_BYTES_MAX,
        }
    }
}

impl std::fmt::Display for SectionKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Metadata => f.write_str("metadata"),
            Self::Cpu => f.write_str("cpu"),
            Self::Machine => f.write_str("machine"),
            Self::WorkingSet => f.write_str("working set"),
            Self::Base => f.write_str("base"),
            Self::Memory => f.write_str("memory"),
            Self::MemoryRuns => f.write_str("memory runs"),
            Self::Disk(index) => write!(f, "disk {index}"),
            Self::DiskRuns(index) => write!(f, "disk {index} runs"),
            Self::Unknown(number) => write!(f, "unknown {number:#x}"),
        }
    }
}

/// One line of the section table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: SectionKind,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) digest: [u8; 32],
}

impl Entry {
    pub(crate) fn end(&self) -> u64 {
        self.offset + self.length
    }

    fn flags(&self) -> u32 {
        match self.kind {
            SectionKind::WorkingSet => 0,
            kind if kind.runs_kind().is_some() => FLAG_REQUIRED | FLAG_SPARSE,
            _ => FLAG_REQUIRED,
        }
    }

    /// Whether a restore depends on it.
    pub(crate) fn is_required(&self) -> bool {
        self.flags() & FLAG_REQUIRED != 0 && !matches!(self.kind, SectionKind::Unknown(_))
    }
}

/// A header that was checked.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) entries: Vec<Entry>,
    pub(crate) file_bytes: u64,
    pub(crate) digest: Digest,
    /// Not checked: that takes a key.
    pub(crate) tag: Option<[u8; TAG_BYTES]>,
}

/// Why the first page of a file is not a header. All but [`HeaderError::Version`] and [`HeaderError::UnknownSection`] mean
/// that the file is damaged: rebuild it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum HeaderError {
    /// Shorter than any snapshot.
    #[error("file has {0} bytes, a snapshot has at least {HEADER_PAGE_BYTES}: it was cut short")]
    Short(u64),
    /// Something else than a snapshot.
    #[error("file does not start with \"THAWSNAP\": it is no snapshot, or its start is damaged")]
    Magic,
    /// Another version's.
    #[error(
        "snapshot has format version {0}, this thaw reads version {FORMAT_VERSION}: deploy the function again"
    )]
    Version(u32),
    /// Announced header length is impossible.
    #[error("snapshot header announces {0} bytes and {1} sections, which do not belong together")]
    Length(u32, u32),
    /// Bytes that mean nothing in this version are used.
    #[error("snapshot header has reserved bytes that are not zero")]
    Reserved,
    /// The header's bytes changed after it was written.
    #[error("snapshot header does not match its digest: the file is damaged")]
    Digest,
    /// Cut short or grown.
    #[error(
        "snapshot should have {expected} bytes and has {found}: it was cut short or appended to"
    )]
    FileLength {
        /// What the header says.
        expected: u64,
        /// What the file has.
        found: u64,
    },
    /// The table contradicts itself.
    #[error("snapshot section {kind} at {offset}+{length} is misplaced: {why}")]
    Table {
        /// Which.
        kind: SectionKind,
        /// Where it claims to start.
        offset: u64,
        /// How long it claims to be.
        length: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// A later version's section that must be understood.
    #[error(
        "snapshot needs section kind {0:#x}, which this thaw does not know: use the thaw that wrote it, or deploy again"
    )]
    UnknownSection(u32),
    /// A section that another one needs.
    #[error("snapshot has no section {0}, without which another makes no sense")]
    Missing(SectionKind),
}

/// The header's page: header, then zeros, no tag among them.
pub(crate) fn encode(entries: &[Entry], file_bytes: u64) -> (Vec<u8>, Digest) {
    assert!(
        entries.len() <= SECTION_COUNT_MAX,
        "the writer refuses more sections"
    );
    let count = u32::try_from(entries.len()).unwrap_or(u32::MAX);
    let header_bytes = u32::try_from(header_end(entries.len())).unwrap_or(u32::MAX);
    let mut page = Vec::with_capacity(HEADER_PAGE_BYTES);
    page.extend_from_slice(&MAGIC);
    page.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    page.extend_from_slice(&header_bytes.to_le_bytes());
    page.extend_from_slice(&file_bytes.to_le_bytes());
    page.extend_from_slice(&count.to_le_bytes());
    page.extend_from_slice(&[0; 4]);
    for entry in entries {
        page.extend_from_slice(&entry.kind.number().to_le_bytes());
        page.extend_from_slice(&entry.flags().to_le_bytes());
        page.extend_from_slice(&entry.offset.to_le_bytes());
        page.extend_from_slice(&entry.length.to_le_bytes());
        page.extend_from_slice(&entry.digest);
        page.extend_from_slice(&[0; 8]);
    }
    let digest = *blake3::hash(&page).as_bytes();
    page.extend_from_slice(&digest);
    page.resize(HEADER_PAGE_BYTES, 0);
    (page, Digest(digest))
}

/// What a restore depends on, whatever else stands in the file and wherever it lies: kind, length and digest of each required
/// section, in the order of the file.
pub(crate) fn content_digest(entries: &[Entry]) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"thaw snapshot content 1\0");
    for entry in entries.iter().filter(|entry| entry.is_required()) {
        hasher.update(&entry.kind.number().to_le_bytes());
        hasher.update(&entry.length.to_le_bytes());
        hasher.update(&entry.digest);
    }
    Digest(*hasher.finalize().as_bytes())
}

/// Where the header ends; its page is zero from there on.
pub(crate) const fn header_end(section_count: usize) -> u64 {
    (FIXED_BYTES + section_count * ENTRY_BYTES + DIGEST_BYTES) as u64
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|rest| rest.first_chunk())
        .map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

/// Checks in this order: size, magic, version, lengths, digest, file length, table.
pub(crate) fn decode(page: &[u8], found: u64) -> Result<Header, HeaderError> {
    if page.len() < HEADER_PAGE_BYTES || found < PAGE_BYTES {
        return Err(HeaderError::Short(found));
    }
    if page[..8] != MAGIC {
        return Err(HeaderError::Magic);
    }
    let version = u32_at(page, 8);
    if version != FORMAT_VERSION {
        return Err(HeaderError::Version(version));
    }
    let (announced, count) = (u32_at(page, 12), u32_at(page, 24));
    let count_usize = count as usize;
    if count_usize > SECTION_COUNT_MAX || u64::from(announced) != header_end(count_usize) {
        return Err(HeaderError::Length(announced, count));
    }
    let (body, digest) = page[..announced as usize].split_at(announced as usize - DIGEST_BYTES);
    let computed = *blake3::hash(body).as_bytes();
    if digest != computed {
        return Err(HeaderError::Digest);
    }
    let expected = u64_at(page, 16);
    if expected != found || expected > FILE_BYTES_MAX {
        return Err(HeaderError::FileLength { expected, found });
    }
    if u32_at(page, 28) != 0 {
        return Err(HeaderError::Reserved);
    }
    let entries = table(&body[FIXED_BYTES..], expected)?;
    let tag = page.last_chunk().filter(|tag| **tag != [0; TAG_BYTES]);
    Ok(Header {
        entries,
        file_bytes: expected,
        digest: Digest(computed),
        tag: tag.copied(),
    })
}

fn table(bytes: &[u8], file_bytes: u64) -> Result<Vec<Entry>, HeaderError> {
    let mut entries: Vec<Entry> = Vec::new();
    let mut free_from = PAGE_BYTES;
    for line in bytes.chunks_exact(ENTRY_BYTES) {
        let (number, flags) = (u32_at(line, 0), u32_at(line, 4));
        let kind = SectionKind::from_number(number);
        let mut digest = [0; 32];
        digest.copy_from_slice(&line[24..56]);
        let entry = Entry {
            kind,
            offset: u64_at(line, 8),
            length: u64_at(line, 16),
            digest,
        };
        if matches!(kind, SectionKind::Unknown(_)) && flags & FLAG_REQUIRED != 0 {
            return Err(HeaderError::UnknownSection(number));
        }
        let reserved = (flags & !(FLAG_REQUIRED | FLAG_SPARSE), u64_at(line, 56));
        if reserved != (0, 0) {
            return Err(HeaderError::Reserved);
        }
        let why = misplaced(&entry, flags, free_from, file_bytes, &entries);
        if let Some(why) = why {
            return Err(HeaderError::Table {
                kind,
                offset: entry.offset,
                length: entry.length,
                why,
            });
        }
        free_from = entry.end();
        entries.push(entry);
    }
    for entry in &entries {
        if let Some(other) = entry.kind.companion()
            && !entries.iter().any(|entry| entry.kind == other)
        {
            return Err(HeaderError::Missing(other));
        }
    }
    Ok(entries)
}

fn misplaced(
    entry: &Entry,
    flags: u32,
    free_from: u64,
    file_bytes: u64,
    before: &[Entry],
) -> Option<&'static str> {
    let known = !matches!(entry.kind, SectionKind::Unknown(_));
    if known && flags != entry.flags() {
        Some("its flags are not those of its kind")
    } else if !entry.offset.is_multiple_of(PAGE_BYTES) {
        Some("it does not start at a page")
    } else if entry.offset < free_from {
        Some("it overlaps what precedes it")
    } else if entry
        .offset
        .checked_add(entry.length)
        .is_none_or(|end| end > file_bytes)
    {
        Some("it ends behind the file's end")
    } else if entry.length > entry.kind.bytes_max() {
        Some("it is longer than its kind may be")
    } else if entry.kind.runs_kind().is_some() && !entry.length.is_multiple_of(PAGE_BYTES) {
        Some("it is no whole number of pages")
    } else if before.iter().any(|other| other.kind == entry.kind) {
        Some("there is another of its kind")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: SectionKind, offset: u64, length: u64) -> Entry {
        Entry {
            kind,
            offset,
            length,
            digest: [7; 32],
        }
    }

    fn decoded(entries: &[Entry], file_bytes: u64) -> Result<Header, HeaderError> {
        decode(&encode(entries, file_bytes).0, file_bytes)
    }

    fn why(result: Result<Header, HeaderError>) -> &'static str {
        match result {
            Err(HeaderError::Table { why, .. }) => why,
            other => panic!("expected a table error, got {other:?}"),
        }
    }

    #[test]
    fn a_header_survives_the_round_trip() {
        let entries = [
            entry(SectionKind::Metadata, 4096, 10),
            entry(SectionKind::DiskRuns(3), 8192, 16),
            entry(SectionKind::Disk(3), 12288, 4096),
        ];
        assert_eq!(decoded(&entries, 16384).unwrap().entries, entries);
    }

    #[test]
    fn overlapping_sections_are_refused() {
        let entries = [
            entry(SectionKind::Metadata, 4096, 5000),
            entry(SectionKind::Cpu, 8192, 1),
        ];
        assert_eq!(
            why(decoded(&entries, 1 << 20)),
            "it overlaps what precedes it"
        );
    }

    #[test]
    fn a_section_over_the_header_is_refused() {
        assert_eq!(
            why(decoded(&[entry(SectionKind::Cpu, 0, 1)], 8192)),
            "it overlaps what precedes it"
        );
    }

    #[test]
    fn lengths_near_the_end_of_the_number_range_are_refused() {
        for length in [u64::MAX, u64::MAX - 4095, u64::MAX - 8191] {
            assert_eq!(
                why(decoded(&[entry(SectionKind::Cpu, 4096, length)], 8192)),
                "it ends behind the file's end"
            );
        }
    }

    #[test]
    fn a_second_section_of_a_kind_is_refused() {
        let entries = [
            entry(SectionKind::Cpu, 4096, 1),
            entry(SectionKind::Cpu, 8192, 1),
        ];
        assert_eq!(
            why(decoded(&entries, 16384)),
            "there is another of its kind"
        );
    }

    #[test]
    fn a_sparse_section_without_runs_is_refused() {
        let result = decoded(&[entry(SectionKind::Memory, 4096, 4096)], 8192);
        assert_eq!(
            result.unwrap_err(),
            HeaderError::Missing(SectionKind::MemoryRuns)
        );
    }

    #[test]
    fn a_section_without_the_one_it_belongs_to_is_refused() {
        for (kind, missing) in [
            (SectionKind::MemoryRuns, SectionKind::Memory),
            (SectionKind::DiskRuns(3), SectionKind::Disk(3)),
            (SectionKind::WorkingSet, SectionKind::Memory),
            (SectionKind::Base, SectionKind::Memory),
        ] {
            let result = decoded(&[entry(kind, 4096, 16)], 8192);
            assert_eq!(result.unwrap_err(), HeaderError::Missing(missing));
        }
    }

    #[test]
    fn bytes_without_a_meaning_are_zero_even_under_a_right_digest() {
        let good = encode(&[entry(SectionKind::Cpu, 4096, 1)], 8192).0;
        let end = usize::try_from(header_end(1)).unwrap() - DIGEST_BYTES;
        // The fixed part's last word, a flag that no kind has, the line's last word.
        for at in [28, 31, FIXED_BYTES + 7, end - 8, end - 1] {
            let mut page = good.clone();
            page[at] |= 0x80;
            let digest = *blake3::hash(&page[..end]).as_bytes();
            page[end..end + DIGEST_BYTES].copy_from_slice(&digest);
            assert_eq!(decode(&page, 8192).unwrap_err(), HeaderError::Reserved);
        }
    }

    #[test]
    fn an_unknown_required_section_is_refused() {
        let result = decoded(&[entry(SectionKind::Unknown(0x9999), 4096, 1)], 8192);
        assert_eq!(result.unwrap_err(), HeaderError::UnknownSection(0x9999));
    }

    #[test]
    fn a_huge_section_count_is_refused_before_the_table_is_read() {
        let mut page = encode(&[], 4096).0;
        page[24..28].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            decode(&page, 4096),
            Err(HeaderError::Length(_, u32::MAX))
        ));
    }
}
