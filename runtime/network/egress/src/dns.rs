//! The resolver of a slot: addresses of names that the policy allows, from the machine's own resolvers. The bytes are a guest's; hickory takes them apart.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use thaw_network::{DomainName, Reason};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::{sleep, timeout};

use crate::answered::TTL_MAX;
use crate::slot::{Slot, lock};

/// Longest query: a name, and the options that clients send.
const QUERY_BYTES_MAX: usize = 1232;
/// Longest answer by UDP to who does not say what fits (RFC 1035, 4.2.1).
const UDP_BYTES: u16 = 512;
/// Longest answer by UDP at all, as no packet is to be cut (DNS Flag Day 2020).
const UDP_BYTES_MAX: u16 = 1232;
/// Most addresses in an answer.
const ADDRESSES_MAX: usize = 32;
/// Longest wait for the machine's resolvers.
const LOOKUP_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for the next query on a connection.
const IDLE_MAX: Duration = Duration::from_secs(10);
/// Pause after a failure to read or accept.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers datagrams until the slot ends.
pub async fn serve_datagrams(slot: Arc<Slot>, socket: UdpSocket) {
    let socket = Arc::new(socket);
    let answering = async {
        let mut query = [0; QUERY_BYTES_MAX];
        loop {
            let Ok((length, from)) = socket.recv_from(&mut query).await else {
                sleep(PAUSE).await;
                continue;
            };
            // Who asks too much is not answered, and asks again later.
            let permit = Arc::clone(&slot.lookups).try_acquire_owned();
            let (true, Ok(permit)) = (slot.admits_query(), permit) else {
                slot.denied(&"names", Reason::TooMany);
                continue;
            };
            let (slot, socket, query) = (
                Arc::clone(&slot),
                Arc::clone(&socket),
                query[..length].to_vec(),
            );
            tokio::spawn(async move {
                let _permit = permit;
                tokio::select! {
                    biased;
                    () = slot.ended.cancelled() => {}
                    () = answer_datagram(&slot, &socket, &query, from) => {}
                }
            });
        }
    };
    tokio::select! {
        biased;
        () = slot.ended.cancelled() => {}
        () = answering => {}
    }
}

async fn answer_datagram(slot: &Slot, socket: &UdpSocket, query: &[u8], from: SocketAddr) {
    let Some((answer, fits)) = answer(slot, query).await else {
        return;
    };
    let whole = answer
        .to_vec()
        .ok()
        .filter(|bytes| bytes.len() <= usize::from(fits));
    let bytes = whole.or_else(|| answer.truncate().to_vec().ok());
    if let Some(bytes) = bytes {
        // A guest that does not take its answer asks again.
        let _ = socket.send_to(&bytes, from).await;
    }
}

/// Answers connections, one query after the other, until the slot ends.
pub async fn serve_connections(slot: Arc<Slot>, listener: TcpListener) {
    let taking = async {
        loop {
            let wait = lock(&slot.beginnings).wait(slot.machine.now());
            sleep(wait).await;
            let Ok((stream, _)) = listener.accept().await else {
                sleep(PAUSE).await;
                continue;
            };
            lock(&slot.beginnings).spend(slot.machine.now(), 1);
            let Some(admitted) = slot.admit() else {
                slot.denied(&"names", Reason::TooMany);
                continue;
            };
            let slot = Arc::clone(&slot);
            tokio::spawn(async move {
                let _admitted = admitted;
                tokio::select! {
                    biased;
                    () = slot.ended.cancelled() => {}
                    _ = answer_connection(&slot, stream) => {}
                }
            });
        }
    };
    tokio::select! {
        biased;
        () = slot.ended.cancelled() => {}
        () = taking => {}
    }
}

async fn answer_connection(slot: &Slot, mut stream: TcpStream) -> Option<()> {
    loop {
        let length = timeout(IDLE_MAX, stream.read_u16()).await.ok()?.ok()?;
        let mut query = vec![0; usize::from(length)];
        if query.len() > QUERY_BYTES_MAX || !slot.admits_query() {
            return None;
        }
        timeout(IDLE_MAX, stream.read_exact(&mut query))
            .await
            .ok()?
            .ok()?;
        let _permit = slot.lookups.acquire().await.ok()?;
        let (answer, _) = answer(slot, &query).await?;
        let bytes = answer.to_vec().ok()?;
        let length = u16::try_from(bytes.len()).ok()?;
        let message = [&length.to_be_bytes()[..], &bytes].concat();
        timeout(IDLE_MAX, stream.write_all(&message))
            .await
            .ok()?
            .ok()?;
    }
}

/// What a query asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    /// Addresses of a name; `None`: something else about it, which has no answer here.
    Name(DomainName, Option<RecordType>),
    /// Nothing that can be answered but by this code.
    Nothing(ResponseCode),
}

/// Takes a query apart: how to answer, what is asked, how long an answer may be. None: it is no query.
fn understand(query: &[u8]) -> Option<(Message, Asked, u16)> {
    let query = Message::from_vec(query).ok()?;
    if query.metadata.message_type != MessageType::Query {
        return None;
    }
    let fits = query.edns.as_ref().map_or(UDP_BYTES, |edns| {
        edns.max_payload().clamp(UDP_BYTES, UDP_BYTES_MAX)
    });
    let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
    answer.metadata = Metadata::response_from_request(&query.metadata);
    answer.metadata.recursion_available = true;
    let asked = match &query.queries[..] {
        _ if query.metadata.op_code != OpCode::Query => Asked::Nothing(ResponseCode::NotImp),
        [question] => {
            answer.add_query(question.clone());
            what(question)
        }
        _ => Asked::Nothing(ResponseCode::FormErr),
    };
    Some((answer, asked, fits))
}

fn what(question: &Query) -> Asked {
    let Ok(name) = DomainName::parse(&question.name.to_ascii()) else {
        return Asked::Nothing(ResponseCode::NXDomain);
    };
    if question.query_class != DNSClass::IN {
        return Asked::Nothing(ResponseCode::NotImp);
    }
    // Only addresses of IPv4 lead anywhere. The others that say where a server is (HTTPS, SVCB) could name addresses past the table, or keys that hide
    // the name that a ClientHello asks for.
    let kind = match question.query_type {
        kind @ (RecordType::A
        | RecordType::CNAME
        | RecordType::MX
        | RecordType::NS
        | RecordType::SOA
        | RecordType::SRV
        | RecordType::TXT) => Some(kind),
        _ => None,
    };
    Asked::Name(name, kind)
}

async fn answer(slot: &Slot, query: &[u8]) -> Option<(Message, u16)> {
    let (mut answer, asked, fits) = understand(query)?;
    let (code, records) = match asked {
        Asked::Nothing(code) => (code, Vec::new()),
        Asked::Name(name, _) if !slot.rules.permits_name(&name) => {
            slot.denied(&name, Reason::NotAllowed);
            (ResponseCode::NXDomain, Vec::new())
        }
        Asked::Name(_, None) => (ResponseCode::NoError, Vec::new()),
        Asked::Name(name, Some(kind)) => look_up(slot, &name, kind).await,
    };
    answer.metadata.response_code = code;
    answer.add_answers(records);
    Some((answer, fits))
}

async fn look_up(slot: &Slot, name: &DomainName, kind: RecordType) -> (ResponseCode, Vec<Record>) {
    let failed = (ResponseCode::ServFail, Vec::new());
    // The root's dot: names are whole, and the machine's search list is not the guest's.
    let (Some(resolver), Ok(owner)) = (
        slot.machine.resolver(),
        Name::from_ascii(format!("{name}.")),
    ) else {
        return failed;
    };
    let found = match timeout(LOOKUP_LIMIT, resolver.lookup(owner.clone(), kind)).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) if error.is_nx_domain() => return (ResponseCode::NXDomain, Vec::new()),
        Ok(Err(error)) if error.is_no_records_found() => {
            return (ResponseCode::NoError, Vec::new());
        }
        _ => return failed,
    };
    let of_kind = found
        .answers()
        .iter()
        .filter(|record| record.record_type() == kind);
    if kind != RecordType::A {
        return (
            ResponseCode::NoError,
            of_kind.take(ADDRESSES_MAX).cloned().collect(),
        );
    }
    let addresses: Vec<(Ipv4Addr, u32)> = of_kind
        .take(ADDRESSES_MAX)
        .filter_map(|record| match &record.data {
            RData::A(A(address)) => Some((*address, record.ttl)),
            _ => None,
        })
        .collect();
    let told: Vec<Record> = addresses
        .iter()
        .filter(|(address, ttl)| {
            slot.tells(
                name,
                *address,
                Duration::from_secs(u64::from(*ttl)).min(TTL_MAX),
            )
        })
        .map(|(address, ttl)| Record::from_rdata(owner.clone(), *ttl, RData::A(A(*address))))
        .collect();
    if told.len() < addresses.len() {
        slot.denied(name, Reason::Rebinding);
    }
    if told.is_empty() && !addresses.is_empty() {
        return (ResponseCode::NXDomain, told);
    }
    (ResponseCode::NoError, told)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn query(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.id = 7;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message.to_vec().unwrap()
    }

    #[test]
    fn a_query_is_understood_and_its_answer_bears_its_number() {
        let (answer, asked, fits) = understand(&query("API.Example.com.", RecordType::A)).unwrap();
        let name = DomainName::parse("api.example.com").unwrap();
        assert_eq!(asked, Asked::Name(name.clone(), Some(RecordType::A)));
        assert_eq!(
            (answer.metadata.id, answer.queries.len(), fits),
            (7, 1, 512)
        );
        for kind in [
            RecordType::AAAA,
            RecordType::HTTPS,
            RecordType::SVCB,
            RecordType::ANY,
        ] {
            let (_, asked, _) = understand(&query("api.example.com.", kind)).unwrap();
            assert_eq!(asked, Asked::Name(name.clone(), None));
        }
    }

    #[test]
    fn what_is_no_query_gets_no_answer_and_what_is_odd_an_error() {
        let bytes = query("a.b.", RecordType::A);
        let mut response = bytes.clone();
        response[2] |= 0x80;
        assert!(understand(&response).is_none());
        assert!(understand(&bytes[..11]).is_none());
        let mut notify = bytes.clone();
        notify[2] |= 4 << 3;
        let (_, asked, _) = understand(&notify).unwrap();
        assert_eq!(asked, Asked::Nothing(ResponseCode::NotImp));
        let none = [7, 7, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let (_, asked, _) = understand(&none).unwrap();
        assert_eq!(asked, Asked::Nothing(ResponseCode::FormErr));
        let (_, asked, _) = understand(&query("4.3.2.1.in-addr.arpa.", RecordType::PTR)).unwrap();
        assert!(matches!(asked, Asked::Name(_, None)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100_000))]
        #[test]
        fn any_bytes_are_taken(bytes in proptest::collection::vec(any::<u8>(), 0..80), whole: bool) {
            let bytes = if whole { [&[0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &bytes].concat() } else { bytes };
            if let Some((answer, _, _)) = understand(&bytes) {
                prop_assert!(answer.to_vec().is_ok());
                prop_assert!(answer.truncate().to_vec().is_ok());
            }
        }
    }
}
