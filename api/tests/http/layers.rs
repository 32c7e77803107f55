//! Layers: their versions, their policies, and functions that have them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::server::{Answer, Server, zip};
use super::{FUNCTIONS, good, refused};

const LAYERS: &str = "/2018-10-31/layers";
const ARN: &str = "arn:aws:lambda:us-east-1:000000000000:layer";

async fn put(server: &Server, path: &str, body: &Value) -> Answer {
    let body = body.to_string();
    server.send("PUT", path, &[], body.as_bytes()).await
}

async fn delete(server: &Server, path: &str) -> Answer {
    server.send("DELETE", path, &[], b"").await
}

fn content(text: &str) -> Value {
    let zip = zip(&[("python/lib.py", text.as_bytes())]);
    json!({ "ZipFile": STANDARD.encode(zip) })
}

async fn publish(server: &Server, name: &str, text: &str) -> Value {
    let path = format!("{LAYERS}/{name}/versions");
    let made = server.post(&path, &json!({"Content": content(text)})).await;
    assert_eq!(made.status, 201, "{}", made.text());
    made.json()
}

/// A function with these layers.
fn with_layers(name: &str, arns: &[&str]) -> Value {
    let mut body = good(name);
    body["Layers"] = json!(arns);
    body
}

#[tokio::test]
async fn layer_versions_are_published_listed_found_and_deleted_and_no_number_is_given_twice() {
    let server = Server::start().await;
    let path = format!("{LAYERS}/lib/versions");
    let body = json!({
        "Content": content("x = 1\n"), "Description": "ours", "LicenseInfo": "MIT",
        "CompatibleRuntimes": ["python3.11", "provided"], "CompatibleArchitectures": ["x86_64"],
    });
    let made = server.post(&path, &body).await;
    assert_eq!(made.status, 201, "{}", made.text());
    let first = made.json();
    assert_eq!(first["LayerArn"], format!("{ARN}:lib"));
    assert_eq!(first["LayerVersionArn"], format!("{ARN}:lib:1"));
    assert_eq!(
        (&first["Version"], &first["Description"]),
        (&json!(1), &json!("ours"))
    );
    let uploaded = zip(&[("python/lib.py", b"x = 1\n")]);
    assert_eq!(first["Content"]["CodeSize"], json!(uploaded.len()));
    let second = publish(&server, "lib", "x = 2\n").await;
    assert_eq!(
        (&second["Version"], &second["Description"]),
        (&json!(2), &json!(""))
    );
    assert!(second.get("CompatibleRuntimes").is_none(), "{second}");

    for found in [
        server.get(&format!("{path}/1")).await,
        server
            .get(&format!("{LAYERS}?find=LayerVersion&Arn={ARN}:lib:1"))
            .await,
        server.get(&format!("{LAYERS}/{ARN}:lib/versions/1")).await,
    ] {
        assert_eq!((found.status, &found.json()), (200, &first));
    }
    let location = first["Content"]["Location"].as_str().unwrap();
    let location = location
        .strip_prefix(&format!("http://{}", server.address))
        .unwrap();
    assert_eq!(server.get(location).await.body, uploaded);

    publish(&server, "another", "y = 1\n").await;
    let numbers = |list: &Value| -> Vec<u64> {
        let versions = list["LayerVersions"].as_array().unwrap();
        versions
            .iter()
            .map(|v| v["Version"].as_u64().unwrap())
            .collect()
    };
    let page = server.get(&format!("{path}?MaxItems=1")).await.json();
    assert_eq!(numbers(&page), [2]);
    let marker = page["NextMarker"].as_str().unwrap();
    let page = server.get(&format!("{path}?Marker={marker}")).await.json();
    assert_eq!((numbers(&page), page.get("NextMarker")), (vec![1], None));
    let fitting = server
        .get(&format!("{path}?CompatibleRuntime=provided"))
        .await;
    assert_eq!(numbers(&fitting.json()), [1]);
    let layers = server.get(LAYERS).await.json();
    assert_eq!(layers["Layers"][0]["LayerName"], "another");
    assert_eq!(layers["Layers"][1]["LatestMatchingVersion"]["Version"], 2);
    let fitting = server
        .get(&format!("{LAYERS}?CompatibleArchitecture=x86_64"))
        .await
        .json();
    assert_eq!(fitting["Layers"].as_array().unwrap().len(), 1);
    assert_eq!(fitting["Layers"][0]["LatestMatchingVersion"]["Version"], 1);

    for _ in 0..2 {
        assert_eq!(delete(&server, &format!("{path}/2")).await.status, 204);
    }
    let gone = server.get(&format!("{path}/2")).await;
    refused(&gone, 404, "ResourceNotFoundException");
    assert_eq!(delete(&server, &format!("{path}/1")).await.status, 204);
    assert_eq!(server.get(&path).await.json()["LayerVersions"], json!([]));
    assert_eq!(
        server.get(LAYERS).await.json()["Layers"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    // What a crash would have left.
    let stray = server.home().join("layers/lib/stray");
    std::fs::create_dir_all(&stray).unwrap();
    let home = server.stop().await;
    let server = Server::start_in(home).await;
    assert!(!stray.exists());
    assert_eq!(publish(&server, "lib", "x = 3\n").await["Version"], 3);
    let kept = server.get(&format!("{LAYERS}/another/versions/1")).await;
    assert_eq!(kept.status, 200);
    let folders = std::fs::read_dir(server.home().join("layers/lib")).unwrap();
    assert_eq!(folders.count(), 1, "deleted versions' zips are gone");
    server.stop().await;
}

#[tokio::test]
async fn what_makes_no_layer_is_refused_in_lambdas_words() {
    let server = Server::start().await;
    let publish = async |name: &str, body: Value, status: u16, code: &str| {
        let path = format!("{LAYERS}/{name}/versions");
        refused(&server.post(&path, &body).await, status, code)
    };
    let (validation, invalid) = ("ValidationException", "InvalidParameterValueException");
    let text = publish("lib", json!({}), 400, validation).await;
    assert!(text.contains("Value null at 'content'"), "{text}");
    let good = content("x = 1\n");
    publish("a%2Fb", json!({"Content": good}), 400, validation).await;
    publish(&"x".repeat(141), json!({"Content": good}), 400, validation).await;
    let cobol = json!({"Content": good, "CompatibleRuntimes": ["cobol"]});
    let text = publish("lib", cobol, 400, validation).await;
    assert!(
        text.contains("Value '[cobol]' at 'compatibleRuntimes'"),
        "{text}"
    );
    let broken = json!({"Content": {"ZipFile": "bm8gemlw"}});
    let text = publish("lib", broken, 400, invalid).await;
    assert!(text.starts_with("Could not unzip uploaded file."), "{text}");
    publish("lib", json!({"Content": {}}), 400, invalid).await;
    let number = server.get(&format!("{LAYERS}/lib/versions/0")).await;
    refused(&number, 400, invalid);
    let arn = server
        .get(&format!("{LAYERS}?find=LayerVersion&Arn=lib:1"))
        .await;
    refused(&arn, 400, validation);
    let page = server.get(&format!("{LAYERS}?MaxItems=51")).await;
    refused(&page, 400, validation);
    assert_eq!(server.get(LAYERS).await.json()["Layers"], json!([]));
    server.stop().await;
}

#[tokio::test]
async fn a_function_keeps_the_layers_that_it_has_and_its_versions_keep_theirs() {
    let server = Server::start().await;
    let (mut arns, mut sizes) = (Vec::new(), Vec::new());
    for name in ["one", "two"] {
        let made = publish(&server, name, name).await;
        arns.push(made["LayerVersionArn"].as_str().unwrap().to_owned());
        sizes.push(made["Content"]["CodeSize"].clone());
    }
    let shown =
        json!([{"Arn": arns[1], "CodeSize": sizes[1]}, {"Arn": arns[0], "CodeSize": sizes[0]}]);
    let made = server
        .post(FUNCTIONS, &with_layers("f", &[&arns[1], &arns[0]]))
        .await;
    assert_eq!(
        (made.status, &made.json()["Layers"]),
        (201, &shown),
        "{}",
        made.text()
    );
    server.deployed("f").await;
    assert_eq!(
        server.machine.layers(),
        [b"two".to_vec(), b"one".to_vec()],
        "in their order"
    );
    let versions = format!("{FUNCTIONS}/f/versions");
    assert_eq!(
        server.post(&versions, &json!({})).await.json()["Version"],
        "1"
    );
    server.version_deployed("f", "1").await;

    // A deleted version stays with who has it, through changes of all else, and is nothing for others.
    assert_eq!(
        delete(&server, &format!("{LAYERS}/two/versions/1"))
            .await
            .status,
        204
    );
    let configuration = format!("{FUNCTIONS}/f/configuration");
    let changed = put(&server, &configuration, &json!({"Timeout": 9})).await;
    assert_eq!(changed.json()["Layers"], shown);
    server.deployed("f").await;
    assert_eq!(server.machine.layers(), [b"two".to_vec(), b"one".to_vec()]);
    let code = STANDARD.encode(zip(&[("app.py", b"x = 2\n")]));
    let changed = put(
        &server,
        &format!("{FUNCTIONS}/f/code"),
        &json!({"ZipFile": code}),
    )
    .await;
    assert_eq!(changed.json()["Layers"], shown);
    server.deployed("f").await;
    assert_eq!(server.machine.layers(), [b"two".to_vec(), b"one".to_vec()]);
    let other = server.post(FUNCTIONS, &with_layers("g", &[&arns[1]])).await;
    let text = refused(&other, 400, "InvalidParameterValueException");
    assert_eq!(text, format!("Layer version {} does not exist.", arns[1]));

    let freezes = server.machine.freezes();
    let changed = put(&server, &configuration, &json!({"Layers": [arns[0]]})).await;
    assert_eq!(
        changed.json()["Layers"],
        json!([{"Arn": arns[0], "CodeSize": sizes[0]}])
    );
    server.deployed("f").await;
    assert_eq!(server.machine.freezes(), freezes + 1);
    assert_eq!(server.machine.layers(), [b"one".to_vec()]);
    let changed = put(&server, &configuration, &json!({"Layers": []})).await;
    assert!(changed.json().get("Layers").is_none());
    server.deployed("f").await;
    assert_eq!(server.machine.layers(), Vec::<Vec<u8>>::new());
    let home = server.stop().await;
    let server = Server::start_in(home).await;
    let first = server
        .get(&format!("{FUNCTIONS}/f/configuration?Qualifier=1"))
        .await;
    assert_eq!(first.json()["Layers"], shown, "a version never changes");
    server.stop().await;
}

#[tokio::test]
async fn layers_that_do_not_fit_together_are_refused_in_lambdas_words() {
    let server = Server::start().await;
    let mut arns = Vec::new();
    for name in ["a", "b", "c", "d", "e", "f"] {
        publish(&server, name, name).await;
        arns.push(format!("{ARN}:{name}:1"));
    }
    publish(&server, "a", "again").await;
    let refuse = async |layers: Value, code: &str| {
        let mut body = good("g");
        body["Layers"] = layers;
        refused(&server.post(FUNCTIONS, &body).await, 400, code)
    };
    let invalid = "InvalidParameterValueException";
    let text = refuse(json!(arns), invalid).await;
    assert_eq!(text, "Cannot reference more than 5 layers.");
    let text = refuse(json!([arns[0], format!("{ARN}:a:2")]), invalid).await;
    assert!(text.ends_with("are versions of the same layer."), "{text}");
    let missing = format!("{ARN}:a:3");
    let text = refuse(json!([missing]), invalid).await;
    assert_eq!(text, format!("Layer version {missing} does not exist."));
    let far = missing.replace("us-east-1", "eu-west-1");
    let text = refuse(json!([far]), invalid).await;
    assert!(
        text.ends_with("expected to be in region us-east-1."),
        "{text}"
    );
    let text = refuse(json!(["a:1"]), "ValidationException").await;
    assert!(
        text.contains("at 'layers' failed to satisfy constraint"),
        "{text}"
    );

    // Two of these have more than 262,144,000 bytes.
    let large = vec![0; 131_072_001];
    let large = STANDARD.encode(zip(&[("zeros", &large)]));
    for name in ["large", "larger"] {
        let path = format!("{LAYERS}/{name}/versions");
        let made = server
            .post(&path, &json!({"Content": {"ZipFile": large}}))
            .await;
        assert_eq!(made.status, 201, "{}", made.text());
    }
    let two = [format!("{ARN}:large:1"), format!("{ARN}:larger:1")];
    let text = refuse(json!(two), invalid).await;
    assert_eq!(
        text,
        "Function code combined with layers exceeds the maximum allowed size of 262144000 bytes. The actual size is 262144008 bytes."
    );
    let made = server.post(FUNCTIONS, &with_layers("g", &[&two[0]])).await;
    assert_eq!(made.status, 201, "{}", made.text());
    server.deployed("g").await;
    let configuration = format!("{FUNCTIONS}/g/configuration");
    let changed = put(&server, &configuration, &json!({"Layers": two})).await;
    refused(&changed, 400, invalid);
    let code = json!({"ZipFile": large});
    let changed = put(&server, &format!("{FUNCTIONS}/g/code"), &code).await;
    refused(&changed, 400, invalid);
    assert_eq!(server.revisions("g").len(), 1, "nothing half-made is left");
    server.stop().await;
}

#[tokio::test]
async fn a_layers_policy_has_statements_that_come_and_go() {
    let server = Server::start().await;
    let policy = format!("{LAYERS}/lib/versions/1/policy");
    let statement =
        json!({"StatementId": "all", "Action": "lambda:GetLayerVersion", "Principal": "*"});
    let missing = server.post(&policy, &statement).await;
    let text = refused(&missing, 404, "ResourceNotFoundException");
    assert_eq!(text, format!("Layer version {ARN}:lib:1 does not exist."));
    publish(&server, "lib", "x").await;
    let none = server.get(&policy).await;
    let text = refused(&none, 404, "ResourceNotFoundException");
    assert_eq!(text, "No policy is associated with the given resource.");

    let added = server.post(&policy, &statement).await;
    assert_eq!(added.status, 201, "{}", added.text());
    let revision = added.json()["RevisionId"].as_str().unwrap().to_owned();
    let written: Value = serde_json::from_str(added.json()["Statement"].as_str().unwrap()).unwrap();
    let expected = json!({
        "Sid": "all", "Effect": "Allow", "Principal": "*", "Action": "lambda:GetLayerVersion",
        "Resource": format!("{ARN}:lib:1"),
    });
    assert_eq!(written, expected);
    let again = server.post(&policy, &statement).await;
    refused(&again, 409, "ResourceConflictException");
    let ours = json!({
        "StatementId": "ours", "Action": "lambda:GetLayerVersion", "Principal": "123456789012",
        "OrganizationId": "o-0123456789",
    });
    let stale = server.post(&format!("{policy}?RevisionId=x"), &ours).await;
    refused(&stale, 412, "PreconditionFailedException");
    let added = server
        .post(&format!("{policy}?RevisionId={revision}"), &ours)
        .await;
    assert_eq!(added.status, 201, "{}", added.text());
    let found = server.get(&policy).await.json();
    assert_eq!(found["RevisionId"], added.json()["RevisionId"]);
    let document: Value = serde_json::from_str(found["Policy"].as_str().unwrap()).unwrap();
    assert_eq!(
        (&document["Version"], &document["Id"]),
        (&json!("2012-10-17"), &json!("default"))
    );
    assert_eq!(document["Statement"][0], expected);
    assert_eq!(
        document["Statement"][1]["Principal"]["AWS"],
        "arn:aws:iam::123456789012:root"
    );
    let wrong = json!({"StatementId": "a b", "Action": "lambda:All", "Principal": "me"});
    let text = refused(
        &server.post(&policy, &wrong).await,
        400,
        "ValidationException",
    );
    assert!(text.starts_with("3 validation errors detected"), "{text}");

    assert_eq!(delete(&server, &format!("{policy}/all")).await.status, 204);
    let gone = delete(&server, &format!("{policy}/all")).await;
    refused(&gone, 404, "ResourceNotFoundException");
    assert_eq!(delete(&server, &format!("{policy}/ours")).await.status, 204);
    refused(&server.get(&policy).await, 404, "ResourceNotFoundException");
    server.stop().await;
}
