//! SnapStart's hooks as the official runtime client has them; answers with what ran so far.
use std::sync::{Arc, Mutex};

use lambda_runtime::{BoxFuture, Error, LambdaEvent, Runtime, SnapStartResource, service_fn};
use serde_json::Value;

type Seen = Arc<Mutex<Vec<String>>>;

struct Resource {
    name: &'static str,
    seen: Seen,
}

impl Resource {
    fn note(&self, hook: &str) {
        self.seen.lock().unwrap().push(format!("{hook} {}", self.name));
    }
}

impl SnapStartResource for Resource {
    fn before_snapshot(&self) -> BoxFuture<'_, Result<(), Error>> {
        self.note("before");
        Box::pin(async { Ok(()) })
    }

    fn after_restore(&self) -> BoxFuture<'_, Result<(), Error>> {
        self.note("after");
        Box::pin(async move {
            match std::env::var("FAIL") {
                Ok(failing) if failing == self.name => Err("no network yet".into()),
                _ => Ok(()),
            }
        })
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let seen = Seen::default();
    let resource = |name| Arc::new(Resource { name, seen: seen.clone() });
    let told = seen.clone();
    let handler = service_fn(move |_: LambdaEvent<Value>| {
        let told = told.lock().unwrap().clone();
        async { Ok::<_, Error>(told) }
    });
    let runtime = Runtime::new(handler).register_snapstart_resource(resource("pool"));
    runtime.register_snapstart_resource(resource("cache")).run().await
}
