//! `openapi.json` and the program say the same: paths, fields, what is required, ranges, lengths, values, answers.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::net::UnixStream;

use common::{Code, Machine, hand_over, machines, tap};
use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use roost_vmm::api::routes::ROUTES;
use roost_vmm::client::{Client, ClientError};
use serde_json::{Map, Value, json};

fn document() -> Value {
    serde_json::from_str(include_str!("../openapi.json")).unwrap()
}

/// A schema with its reference followed, and the name if it has one.
fn follow<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(to) => document.pointer(&to[1..]).unwrap_or_else(|| panic!("{to} is nowhere")),
        None => schema,
    }
}

fn fields(schema: &Value) -> &Map<String, Value> {
    schema["properties"].as_object().unwrap()
}

fn names<'a>(list: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    list.into_iter().map(str::to_owned).collect()
}

fn strings(list: &Value) -> BTreeSet<String> {
    names(list.as_array().into_iter().flatten().filter_map(Value::as_str))
}

/// The schema of a body of JSON that a request takes or a success answers with.
fn schema<'a>(document: &'a Value, content: &'a Value) -> Option<&'a Value> {
    let schema = &content["content"]["application/json"]["schema"];
    (!schema.is_null()).then(|| follow(document, schema))
}

/// The names in backquotes behind "expected" in serde's refusal of a field or a value.
fn expected(why: &str) -> BTreeSet<String> {
    let list = why.split_once("expected").map_or("", |(_, list)| list);
    names(list.split('`').skip(1).step_by(2))
}

/// The fields that may only be there with this one.
fn needed_by<'a>(schema: &'a Value, name: &'a str) -> impl Iterator<Item = &'a String> {
    let rules = schema["dependentSchemas"].as_object().into_iter().flatten();
    rules.filter(move |(_, rule)| strings(&rule["required"]).contains(name)).map(|(other, _)| other)
}

/// The fields that may only be there if this one does not have this value.
fn ruled_out_by<'a>(schema: &'a Value, name: &'a str, value: &'a Value) -> impl Iterator<Item = &'a String> {
    let rules = schema["dependentSchemas"].as_object().into_iter().flatten();
    let other = move |rule: &Value| rule["properties"][name].get("const").is_some_and(|only| only != value);
    rules.filter(move |(_, rule)| other(rule)).map(|(field, _)| field)
}

/// A machine whose guest does nothing, configured by its API; with a balloon and a disk once it runs.
fn machine(started: bool) -> (Machine, Client) {
    // hlt; jmp to it
    let mut machine = Machine::new(&Code::default().bytes(&[0xf4, 0xeb, 0xfd]));
    if started {
        machine.config["balloon"] = json!({ "amount_mib": 0, "stats_polling_interval_s": 5 });
        machine.config["drives"] = json!([{ "drive_id": "a", "path_on_host": machine.text("disk") }]);
        machine.config["machine-config"]["max_vcpu_count"] = json!(32);
        machine.config["memory-hotplug"] = json!({ "total_size_mib": 1024 });
        common::disk(&machine.path("disk"), 1 << 20);
        machine.start::<&str>(&[]);
    } else {
        let socket = machine.text("api");
        let (_files, handed) = common::hand(&machine, &["log", "metrics"]);
        let mut words = vec!["run", "--api-sock", &socket];
        words.extend(handed.iter().map(String::as_str));
        machine.start_with(&words);
    }
    let client = machine.client();
    (machine, client)
}

/// A paused machine with all devices that a loaded snapshot may find elsewhere, and files for a snapshot, handed over.
fn paused(tap: &File) -> (Machine, Client) {
    let mut machine = Machine::new(&Code::default().stop());
    make_overlay(&machine);
    common::disk(&machine.path("base"), 1 << 20);
    machine.config["drives"] =
        json!([{ "drive_id": "root", "path_on_host": machine.text("overlay"), "format": "qcow2" }]);
    machine.config["network-interfaces"] = json!([{ "iface_id": "eth0", "host_dev_name": "tap" }]);
    machine.config["vsock"] = json!({ "guest_cid": 3, "uds_path": machine.text("v.sock") });
    machine.config["pmem"] = json!([{ "id": "data", "path_on_host": machine.text("data") }]);
    ["data", "copy"].into_iter().for_each(|name| common::disk(&machine.path(name), 2 << 20));
    let (_files, mut arguments) = common::hand(&machine, &["state", "memory", "overlay", "base"]);
    arguments.extend(machines::tap_argument(tap));
    machine.start(&arguments);
    let client = machine.client();
    client.pause().unwrap();
    (machine, client)
}

/// A monitor without a machine, with everything at hand that the example of a snapshot's load names.
fn before_load(snapshot: &Machine, tap: &File) -> (Machine, Client) {
    let mut machine = Machine::new(&Code::default());
    std::fs::create_dir(machine.path("sockets")).unwrap();
    let names = ["state", "memory", "overlay", "base", "copy"];
    let (_files, mut arguments) = common::hand(snapshot, &names);
    let folder = File::open(machine.path("sockets")).unwrap();
    let (_console, console) = common::hand(&machine, &["console"]);
    let (input, _) = UnixStream::pair().unwrap();
    let others = [hand_over("tap1", tap), hand_over("sockets", &folder), hand_over("input", &input)];
    arguments.extend(others.into_iter().flatten().chain(console));
    let socket = machine.text("api");
    let mut all = vec!["run", "--api-sock", &socket];
    all.extend(arguments.iter().map(String::as_str));
    machine.start_with(&all);
    let client = machine.client();
    (machine, client)
}

/// An overlay of the same size, without a name of a base in it.
fn make_overlay(machine: &Machine) {
    let file = File::create_new(machine.path("overlay")).unwrap();
    let storage: imago::file::File = file.try_into().unwrap();
    let builder = Qcow2::<imago::file::File>::create_builder(storage).size(1 << 20);
    builder.create().unwrap();
}

/// One request of the API with its body.
struct Call<'a> {
    document: &'a Value,
    /// The monitor that a request goes to; some requests are each monitor's last.
    client: &'a dyn Fn() -> (Option<Machine>, Client),
    method: String,
    path: &'a str,
    schema: &'a Value,
}

impl Call<'_> {
    fn send(&self, body: &Value) -> Result<(), String> {
        let id = ["drive_id", "iface_id", "id"].iter().find_map(|name| body[name].as_str());
        let id = id.filter(|id| !id.is_empty()).unwrap_or("x");
        let (_machine, client) = (self.client)();
        match client.put(&self.method, &self.path.replace("{id}", id), body) {
            Ok(()) => Ok(()),
            Err(ClientError::Refused(why)) => Err(why),
            Err(other) => panic!("{} {}: {other:?}", self.method, self.path),
        }
    }

    #[track_caller]
    fn taken(&self, body: &Value) {
        self.send(body).unwrap_or_else(|why| panic!("{} {} {body}: {why}", self.method, self.path));
    }

    #[track_caller]
    fn refused(&self, body: &Value) -> String {
        match self.send(body) {
            Ok(()) => panic!("{} {} took {body}", self.method, self.path),
            Err(why) => why,
        }
    }

    /// All that the document says about the body.
    fn check(&self) {
        let example = &self.schema["example"];
        self.taken(example);
        self.object(example, &[]);
    }

    /// Fields of which exactly one is there: the example has the first.
    fn either(&self, schema: &Value, with: impl Fn(&str, Option<Value>) -> Value) -> BTreeSet<String> {
        let choices: Vec<String> = schema["oneOf"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|choice| strings(&choice["required"]))
            .collect();
        let [first, other] = choices.as_slice() else { return BTreeSet::new() };
        let value = schema["properties"][other]["example"].clone();
        self.refused(&with(first, None));
        self.refused(&with(other, Some(value.clone())));
        let mut swapped = with(first, None);
        swapped.as_object_mut().unwrap().insert(other.clone(), value);
        self.taken(&swapped);
        choices.into_iter().collect()
    }

    /// Two fields that may not be there together: the example has one of them.
    fn apart(
        &self,
        schema: &Value,
        (body, place): (&Value, &str),
        with: impl Fn(&str, Option<Value>) -> Value,
    ) -> BTreeSet<String> {
        let fields = strings(&schema["not"]["required"]);
        let (has, lacks): (Vec<&String>, Vec<&String>) =
            fields.iter().partition(|name| body.pointer(place).unwrap().get(name).is_some());
        if let ([has], [lacks]) = (&has[..], &lacks[..]) {
            let value = schema["properties"][lacks]["example"].clone();
            self.refused(&with(lacks, Some(value.clone())));
            let mut swapped = with(has, None);
            self.taken(&swapped);
            swapped.pointer_mut(place).unwrap()[lacks.as_str()] = value;
            self.taken(&swapped);
        }
        fields
    }

    /// The object at a place in the body.
    fn object(&self, body: &Value, place: &[&str]) {
        let schema = place.iter().fold(self.schema, |schema, name| {
            let schema = follow(self.document, schema);
            follow(self.document, if *name == "0" { &schema["items"] } else { &schema["properties"][*name] })
        });
        let pointer: String = place.iter().map(|name| format!("/{name}")).collect();
        let with = |name: &str, value: Option<Value>| {
            let mut body = body.clone();
            let object = body.pointer_mut(&pointer).unwrap().as_object_mut().unwrap();
            match value {
                Some(value) => object.insert(name.to_owned(), value),
                None => object.remove(name),
            };
            body
        };

        let why = self.refused(&with("no such field", Some(json!(0))));
        assert_eq!(expected(&why), names(fields(schema).keys().map(String::as_str)), "{}: {why}", self.path);

        let required = strings(&schema["required"]);
        let mut either = self.either(schema, with);
        either.extend(self.apart(schema, (body, &pointer), with));
        for (name, field) in fields(schema).iter().filter(|(name, _)| !either.contains(*name)) {
            if let Some(now) = field["x-now"].as_str() {
                let mut older = with(now, None);
                older[name] = body[now].clone();
                self.taken(&older);
                continue;
            }
            let is = &body.pointer(&pointer).unwrap()[name];
            // The document's example must show each field, or nothing below is looked at.
            assert!(!is.is_null(), "{}: the example has no {name}", self.path);
            if required.contains(name) {
                let why = self.refused(&with(name, None));
                assert!(why.contains(&format!("missing field `{name}`")), "{}: {why}", self.path);
            } else {
                let mut without = with(name, None);
                for other in needed_by(schema, name) {
                    self.refused(&without);
                    without.as_object_mut().unwrap().remove(other);
                }
                self.taken(&without);
            }
            let field = follow(self.document, field);
            let named = |value: Value| {
                let why = self.refused(&with(name, Some(value.clone())));
                assert!(why.contains(name.as_str()), "{} {name} {value}: {why}", self.path);
            };
            match field["type"].as_str().unwrap() {
                "integer" => {
                    let (least, most) =
                        (field["minimum"].as_u64().unwrap(), field["maximum"].as_u64().unwrap());
                    // The memory of this test's machine bounds its balloon and what may come and go.
                    let of_machine = self.method == "PATCH" && name == "mem_size_mib";
                    if !of_machine {
                        self.taken(&with(name, Some(json!(least))));
                    }
                    if !of_machine && name != "amount_mib" && name != "requested_size_mib" {
                        self.taken(&with(name, Some(json!(most))));
                    }
                    if let Some(less) = least.checked_sub(1) {
                        self.refused(&with(name, Some(json!(less))));
                    }
                    if let Some(more) = most.checked_add(1) {
                        self.refused(&with(name, Some(json!(more))));
                    }
                    self.refused(&with(name, Some(json!("1"))));
                    self.refused(&with(name, Some(json!(-1))));
                }
                "boolean" => {
                    for value in [json!(true), json!(false)] {
                        // What it needs of the host may be missing.
                        let needs = field["x-needs"].as_str().filter(|_| value == json!(true));
                        if needs.is_some_and(|path| !std::path::Path::new(path).exists()) {
                            named(value);
                            continue;
                        }
                        match field["enum"].as_array() {
                            Some(allowed) if !allowed.contains(&value) => named(value),
                            _ => {
                                let mut with = with(name, Some(value.clone()));
                                for other in ruled_out_by(schema, name, &value) {
                                    self.refused(&with);
                                    with.as_object_mut().unwrap().remove(other);
                                }
                                self.taken(&with);
                            }
                        }
                    }
                    self.refused(&with(name, Some(json!("true"))));
                }
                "string" if field.get("enum").is_some() => {
                    let why = self.refused(&with(name, Some(json!("no such value"))));
                    assert_eq!(expected(&why), strings(&field["enum"]), "{} {name}: {why}", self.path);
                }
                "string" => {
                    for (rule, off) in [("minLength", -1), ("maxLength", 1)] {
                        let Some(length) = field[rule].as_i64() else { continue };
                        let text = |length: i64| json!("a".repeat(usize::try_from(length).unwrap()));
                        self.taken(&with(name, Some(text(length))));
                        named(text(length + off));
                    }
                    if field.get("pattern").is_some() || field.get("format").is_some() {
                        named(json!("nonsense"));
                    }
                    self.refused(&with(name, Some(json!(1))));
                }
                "object" => self.object(body, &[place, &[name.as_str()]].concat()),
                "array" => {
                    self.refused(&with(name, Some(json!({}))));
                    if field["maxItems"] == json!(0) {
                        named(json!([{}]));
                        continue;
                    }
                    if field["items"]["type"] == "string" {
                        named(json!(["nonsense"]));
                        self.refused(&with(name, Some(json!([1]))));
                        continue;
                    }
                    self.object(body, &[place, &[name.as_str(), "0"]].concat());
                }
                other => panic!("{name} is of type {other}"),
            }
        }
    }
}

/// Whether a value is what a schema says.
fn fits(document: &Value, schema: &Value, value: &Value, place: &str) {
    let schema = follow(document, schema);
    let kind = schema["type"].as_str().unwrap_or("any");
    let right = match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "boolean" => value.is_boolean(),
        _ => true,
    };
    assert!(right, "{place} is {value}, the document says {kind}");
    if let Some(values) = schema["enum"].as_array() {
        assert!(values.contains(value), "{place} is {value}, the document says {values:?}");
    }
    if let Some(list) = value.as_array() {
        list.iter().for_each(|one| fits(document, &schema["items"], one, place));
    }
    let Some(object) = value.as_object() else { return };
    for name in strings(&schema["required"]) {
        assert!(object.contains_key(&name), "{place} has no {name}");
    }
    for (name, value) in object {
        let place = format!("{place}.{name}");
        match (schema["properties"].get(name), &schema["additionalProperties"]) {
            (Some(field), _) => fits(document, field, value, &place),
            (None, Value::Object(_)) => fits(document, &schema["additionalProperties"], value, &place),
            (None, _) => panic!("{place} is not in the document"),
        }
    }
}

#[test]
fn every_path_is_described_and_every_described_path_is_there() {
    let document = document();
    let mut described = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        described
            .extend(methods.as_object().unwrap().keys().map(|method| (method.to_uppercase(), path.clone())));
    }
    let there = ROUTES.iter().map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned())).collect();
    assert_eq!(described, there);
}

#[test]
fn bodies_are_taken_and_refused_as_described() {
    let document = document();
    let mut bodies = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap() {
            let Some(schema) = schema(&document, &operation["requestBody"]) else { continue };
            // They have tests of their own below.
            if path.starts_with("/snapshot/") {
                continue;
            }
            let (_machine, client) = match (method.as_str(), path.contains("{id}")) {
                ("patch", true) => {
                    let Some(tap) = tap::create() else { continue };
                    paused(&tap)
                }
                (method, _) => machine(method == "patch" || path == "/actions"),
            };
            let client = || (None, client.clone());
            Call { document: &document, client: &client, method: method.to_uppercase(), path, schema }
                .check();
            bodies += 1;
        }
    }
    assert_eq!(bodies, if tap::create().is_some() { 23 } else { 21 });
}

#[test]
fn snapshots_are_taken_and_loaded_as_described() {
    let Some(tap) = tap::create() else { return };
    let document = document();
    let call = |path, client: &dyn Fn() -> (Option<Machine>, Client)| {
        let body = &document["paths"][path]["put"]["requestBody"];
        let schema = schema(&document, body).unwrap();
        Call { document: &document, client, method: "PUT".to_owned(), path, schema }.check();
    };
    let (snapshot, client) = paused(&tap);
    call("/snapshot/create", &|| (None, client.clone()));
    client
        .put("PUT", "/snapshot/create", &json!({ "snapshot_path": "state", "mem_file_path": "memory" }))
        .unwrap();
    client.force_stop().unwrap();
    call("/snapshot/load", &|| {
        let (machine, client) = before_load(&snapshot, &tap);
        (Some(machine), client)
    });
}

#[test]
fn answers_are_as_described() {
    let document = document();
    let (_machine, client) = machine(true);
    let mut answers = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        let Some(operation) = methods.get("get") else { continue };
        let answer: Value = serde_json::from_slice(&client.request("GET", path, b"").unwrap()).unwrap();
        fits(&document, schema(&document, &operation["responses"]["200"]).unwrap(), &answer, path);
        answers += 1;
    }
    assert_eq!(answers, 8);
}

#[test]
fn what_is_not_there_is_refused_with_what_is() {
    let (_machine, client) = machine(false);
    for (method, path, words) in [
        ("PUT", "/nonsense", "no such path"),
        ("GET", "/vm/", "no such path"),
        ("PUT", "/drives/", "no such path"),
        ("PUT", "/drives/a/b", "no such path"),
        ("DELETE", "/vm", "it takes PATCH"),
        ("POST", "/machine-config", "it takes GET and PUT and PATCH"),
    ] {
        match client.put(method, path, &json!({})) {
            Err(ClientError::Refused(why)) => assert!(why.contains(path) && why.contains(words), "{why}"),
            other => panic!("{method} {path}: {other:?}"),
        }
    }
}
