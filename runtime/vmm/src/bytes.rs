//! Byte strings in saved state, copied as a whole. serde takes a `Vec<u8>` for a list and visits it byte by byte, which a claim
//! would wait for; postcard's encoding is the same for both (a length, then the bytes).

use std::fmt;

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserializer, Serializer};

/// For `#[serde(with)]`.
///
/// # Errors
/// The serializer's own.
pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

/// For `#[serde(with)]`.
///
/// # Errors
/// The deserializer's own.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    deserializer.deserialize_byte_buf(Bytes)
}

struct Bytes;

impl<'de> Visitor<'de> for Bytes {
    type Value = Vec<u8>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes")
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
        Ok(bytes.to_vec())
    }

    fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
        Ok(bytes)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u8>, A::Error> {
        let mut bytes = Vec::new();
        while let Some(byte) = list.next_element()? {
            bytes.push(byte);
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Listed(Vec<u8>, u32);
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Copied(#[serde(with = "super")] Vec<u8>, u32);

    #[test]
    fn bytes_are_encoded_as_a_list_of_bytes_is() {
        for length in [0, 1, 127, 128, 5000] {
            let content: Vec<u8> = (0..=255).cycle().take(length).collect();
            let listed = postcard::to_stdvec(&Listed(content.clone(), 7)).unwrap();
            let copied = postcard::to_stdvec(&Copied(content.clone(), 7)).unwrap();
            assert_eq!(listed, copied);
            let back: Copied = postcard::from_bytes(&listed).unwrap();
            assert_eq!(back, Copied(content, 7));
            for cut in 0..copied.len() {
                assert!(postcard::from_bytes::<Copied>(&copied[..cut]).is_err());
            }
        }
    }
}
