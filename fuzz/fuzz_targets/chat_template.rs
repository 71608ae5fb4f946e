//! A chat template followed by messages, separated by zero bytes. Rendering must end soon.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ternary_format::{
    Tokenizer,
    chat::{ChatTemplate, Message, Role},
};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let mut parts = text.split('\0');
    let Ok(template) = ChatTemplate::new(parts.next().unwrap_or_default()) else { return };
    let roles = [Role::System, Role::User, Role::Assistant].into_iter().cycle();
    let mut messages: Vec<Message> =
        parts.zip(roles).map(|(content, role)| Message::new(role, content)).collect();
    if messages.is_empty() {
        messages.push(Message::new(Role::User, "hi <|user|>"));
    }
    let _ = template.ids(&Tokenizer::byte(), &messages, true);
});
