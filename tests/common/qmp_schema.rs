//! Checks answers against the schema that the daemon itself returned (QEMU's introspection), as a client could.

use serde_json::Value;

/// What `query-qmp-schema` returned.
pub struct Schema(pub Value);

impl Schema {
    fn all(&self) -> impl Iterator<Item = &Value> {
        self.0.as_array().unwrap().iter()
    }

    fn info(&self, name: &str, metas: &[&str]) -> &Value {
        let mut found =
            self.all().filter(|i| i["name"] == name && metas.iter().any(|m| i["meta-type"] == *m));
        let info = found.next().unwrap_or_else(|| panic!("the schema has no {name}"));
        assert!(found.next().is_none(), "the schema has {name} twice");
        info
    }

    /// Panics unless the answer of that command is as the schema says.
    pub fn check_answer(&self, command: &str, answer: &Value) {
        let returns = self.info(command, &["command"])["ret-type"].as_str().unwrap();
        self.check(command, returns, answer);
    }

    /// Panics unless the event is as the schema says.
    pub fn check_event(&self, event: &Value) {
        let name = event["event"].as_str().unwrap();
        let data = self.info(name, &["event"])["arg-type"].as_str().unwrap();
        self.check(name, data, &event["data"]);
        assert!(event["timestamp"]["seconds"].as_u64() > Some(1_600_000_000), "{event}");
        assert!(event["timestamp"]["microseconds"].as_u64() < Some(1_000_000), "{event}");
    }

    fn check(&self, at: &str, of: &str, value: &Value) {
        let info = self.info(of, &["builtin", "enum", "array", "object"]);
        match info["meta-type"].as_str().unwrap() {
            "builtin" => {
                let fits = match info["json-type"].as_str().unwrap() {
                    "string" => value.is_string(),
                    "int" => value.is_u64() || value.is_i64(),
                    "boolean" => value.is_boolean(),
                    "value" => true,
                    other => panic!("{at}: {other} is no JSON type that is used"),
                };
                assert!(fits, "{at}: {value} is no {of}");
            }
            "enum" => {
                let known = info["values"].as_array().unwrap();
                assert!(known.contains(value), "{at}: {value} is none of {known:?}");
            }
            "array" => {
                let element = info["element-type"].as_str().unwrap();
                let list = value.as_array().unwrap_or_else(|| panic!("{at}: {value} is no list"));
                list.iter().enumerate().for_each(|(i, v)| self.check(&format!("{at}[{i}]"), element, v));
            }
            _ => self.check_object(at, info, value),
        }
    }

    fn check_object(&self, at: &str, info: &Value, value: &Value) {
        let map = value.as_object().unwrap_or_else(|| panic!("{at}: {value} is no object"));
        let mut members: Vec<&Value> = info["members"].as_array().unwrap().iter().collect();
        if let Some(tag) = info["tag"].as_str() {
            let variants = info["variants"].as_array().unwrap();
            let variant = variants.iter().find(|v| v["case"] == map[tag]).unwrap();
            let more = self.info(variant["type"].as_str().unwrap(), &["object"]);
            members.extend(more["members"].as_array().unwrap());
        }
        for member in &members {
            let name = member["name"].as_str().unwrap();
            match map.get(name) {
                Some(v) => self.check(&format!("{at}.{name}"), member["type"].as_str().unwrap(), v),
                None => assert!(member.get("default").is_some(), "{at}: {name} is missing in {value}"),
            }
        }
        for key in map.keys() {
            assert!(members.iter().any(|m| m["name"] == key.as_str()), "{at}: {key} is not in the schema");
        }
    }
}
