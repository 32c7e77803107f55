//! Values that several modules' tests need.

use crate::record::{Code, Function, Revision, Settings, State, Version, VersionId};

/// A function that nobody has named or tagged.
pub fn function(name: &str) -> Function {
    Function {
        name: name.to_owned(),
        ..Function::default()
    }
}

/// A Pending `$LATEST`.
pub fn version(name: &str) -> Version {
    Version {
        name: name.to_owned(),
        id: VersionId::Latest,
        modified_unix_ms: 1_795_440_429_007,
        revision_id: "r".to_owned(),
        target: Revision {
            id: "1".to_owned(),
            settings: Settings {
                runtime: "python3.11".to_owned(),
                handler: "app.handler".to_owned(),
                role: "arn:aws:iam::000000000000:role/r".to_owned(),
                description: String::new(),
                timeout_seconds: 3,
                memory_mib: 128,
                environment: None,
                snap_start: false,
                layers: Vec::new(),
                ephemeral_mib: crate::engine::EPHEMERAL_MIB_DEFAULT,
                logging: crate::record::Logging::default(),
                tracing: crate::record::Tracing::default(),
                network: None,
            },
            code: Code {
                bytes: 10,
                sha256: "c".to_owned(),
                unzipped_bytes: 20,
            },
            key: None,
        },
        state: State::Pending,
        last_update: None,
        serving: None,
    }
}

/// A zip of these files.
pub fn zip(files: &[(&str, &[u8])]) -> Vec<u8> {
    use std::io::Write as _;
    let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    for (name, content) in files {
        writer
            .start_file(*name, zip::write::SimpleFileOptions::default())
            .unwrap();
        writer.write_all(content).unwrap();
    }
    writer.finish().unwrap().into_inner()
}
